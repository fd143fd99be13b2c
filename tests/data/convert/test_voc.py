"""Pascal VOC: the devkit's palette PNGs, CVAT's colours, and XML files with polygons."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpformer.types import InputError
from tests.data.convert.drawings import (
    CORNERS,
    HEIGHT,
    WIDTH,
    box,
    converted,
    l_shape,
    noted,
    objects,
    only,
    picture,
    ring_and_dot,
    text,
)


def palette() -> np.ndarray:
    """The devkit's colours, worked out one index at a time."""
    colors = []
    for index in range(256):
        red = green = blue = 0
        rest = index
        for bit in range(7, -1, -1):
            red |= (rest & 1) << bit
            green |= (rest >> 1 & 1) << bit
            blue |= (rest >> 2 & 1) << bit
            rest >>= 3
        colors.append((red, green, blue))
    return np.array(colors, np.uint8)


def index_png(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("P", (ids.shape[1], ids.shape[0]))
    image.putpalette(palette().ravel().tolist())
    image.frombytes(ids.astype(np.uint8).tobytes())
    image.save(path)


def maps() -> tuple[np.ndarray, np.ndarray]:
    """Object 1 (a cat: a ring and a dot) below object 2 (a dog), with a line of uncertain pixels."""
    ids = np.where(ring_and_dot(), 1, 0)
    ids[box(0, 0, 12, 12)] = 2
    ids[59] = 255
    classes = np.select([ids == 1, ids == 2, ids == 255], [8, 12, 255])
    return ids, classes


def a_set(root: Path) -> Path:
    ids, classes = maps()
    for name in ("2007_000032", "2007_000039", "2008_1.b"):
        picture(root / f"JPEGImages/{name}.jpg")
        index_png(root / f"SegmentationObject/{name}.png", ids)
        index_png(root / f"SegmentationClass/{name}.png", classes)
    text(root / "ImageSets/Segmentation/train.txt", "2008_1.b\n2007_000032\n")
    text(root / "ImageSets/Segmentation/val.txt", "2007_000039\n")
    text(root / "ImageSets/Segmentation/trainval.txt", "2007_000032\n2007_000039\n")
    return root


def test_masks_are_exact_with_holes_and_parts(tmp_path):
    done = converted(a_set(tmp_path / "VOCdevkit/VOC2012").parent, tmp_path / "out")
    assert len(done.classes) == 20
    assert done.classes[7] == "cat"
    assert [(w.split, w.images) for w in done.splits] == [("train", 2), ("val", 1)]
    assert list(objects(tmp_path / "out")) == ["2007_000032.jpg", "2008_1.b.jpg"]
    ids, _ = maps()
    for split in ("train", "val"):
        for listed in objects(tmp_path / "out", split).values():
            assert [name for name, _ in listed] == ["cat", "dog"]
            for number, (_, pixels) in enumerate(listed, 1):
                np.testing.assert_array_equal(pixels, ids == number)
    assert len(noted(done, "uncertain pixels")) == 3
    assert noted(done, "lists passed over") == ["VOC2012/ImageSets/Segmentation/trainval.txt"]


def test_cvat_writes_colours_a_labelmap_and_one_list(tmp_path):
    ids, classes = maps()
    ids, classes = np.where(ids == 255, 0, ids), np.where(classes == 255, 0, classes)
    own = {0: (0, 0, 0), 8: (250, 50, 83), 12: (51, 221, 255)}
    colored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for index, color in own.items():
        colored[classes == index] = color
    src = tmp_path / "src"
    picture(src / "JPEGImages/a.png")
    for folder, pixels in (("SegmentationObject", palette()[ids]), ("SegmentationClass", colored)):
        (src / folder).mkdir()
        Image.fromarray(pixels, "RGB").save(src / folder / "a.png")
    text(src / "ImageSets/Segmentation/default.txt", "a\n")
    text(
        src / "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nhund:51,221,255::\nkatze:250,50,83::\n",
    )
    done = converted(src, tmp_path / "out")
    assert done.classes == ("hund", "katze")
    assert done.without_split
    [listed] = objects(tmp_path / "out").values()
    assert [name for name, _ in listed] == ["katze", "hund"]
    for number, (_, pixels) in enumerate(listed, 1):
        np.testing.assert_array_equal(pixels, ids == number)


def test_a_labelmap_names_the_colours_of_any_palette(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "labelmap.txt", "background:0,0,0::\ncell:9,8,7::\nnucleus:1,2,3::\n")
    ids, _ = maps()
    for path in (src / "SegmentationClass").iterdir():
        image = Image.new("P", (WIDTH, HEIGHT))
        image.putpalette([0, 0, 0, 1, 2, 3, 9, 8, 7])
        image.frombytes(np.select([ids == 1, ids == 2], [1, 2]).astype(np.uint8).tobytes())
        image.save(path)
    done = converted(src, tmp_path / "out")
    assert done.classes == ("cell", "nucleus")
    for listed in objects(tmp_path / "out").values():
        assert [name for name, _ in listed] == ["nucleus", "cell"]
        np.testing.assert_array_equal(listed[0][1], ids == 1)
    text(src / "labelmap.txt", "background:0,0,0::\ncell:9,8,7::\n")
    with pytest.raises(InputError, match="object 1: the colour 1,2,3 of SegmentationClass has no name"):
        converted(src, tmp_path / "other")


def test_a_labelmap_without_colours_takes_those_of_the_palette(tmp_path):
    src = a_set(tmp_path / "src")
    names = ["background", *(f"c{i}" for i in range(1, 13))]
    text(src / "labelmap.txt", "# label : color_rgb : 'body' parts : actions\n" + ":::\n".join([*names, ""]))
    done = converted(src, tmp_path / "out")
    assert done.classes == tuple(names[1:])
    for listed in objects(tmp_path / "out").values():
        assert [name for name, _ in listed] == ["c8", "c12"]
    text(src / "labelmap.txt", "a:1,2::\n")
    with pytest.raises(InputError, match=r"labelmap\.txt:1: name:red,green,blue:: is expected, not '1,2'"):
        converted(src, tmp_path / "out")


def test_an_object_of_two_classes_or_of_none_is_an_error(tmp_path):
    src = a_set(tmp_path / "src")
    ids, classes = maps()
    classes[30:35, 12] = 9
    index_png(src / "SegmentationClass/2007_000039.png", classes)
    with pytest.raises(
        InputError, match=r"2007_000039\.png: object 1: one class .* not cat \(\d+ pixels\), chair"
    ):
        converted(src, tmp_path / "out")
    index_png(src / "SegmentationClass/2007_000039.png", np.where(ids == 2, 0, maps()[1]))
    with pytest.raises(InputError, match="object 2: one class is expected in SegmentationClass, not none"):
        converted(src, tmp_path / "out")
    index_png(src / "SegmentationClass/2007_000039.png", np.where(ids == 2, 77, maps()[1]))
    with pytest.raises(InputError, match="object 2: class 77 of SegmentationClass has no name"):
        converted(src, tmp_path / "out")


def test_missing_files_are_named_or_noted(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "ImageSets/Segmentation/val.txt", "2007_000039\nnowhere\n")
    picture(src / "JPEGImages/of_detection.jpg")
    (src / "SegmentationObject/2008_1.b.png").unlink()
    done = converted(src, tmp_path / "out")
    assert noted(done, "not there") == ["ImageSets/Segmentation/val.txt:2: nowhere"]
    assert noted(done, "without a mask file") == ["ImageSets/Segmentation/train.txt:1: 2008_1.b"]
    assert "JPEGImages/of_detection.jpg" in noted(done, "of no split")
    (src / "SegmentationClass/2007_000039.png").unlink()
    with pytest.raises(InputError, match=r"SegmentationClass/2007_000039\.png: no such file"):
        converted(src, tmp_path / "other")


def test_semantic_masks_alone_are_refused(tmp_path):
    src = a_set(tmp_path / "src")
    for path in (src / "SegmentationObject").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="SegmentationClass without SegmentationObject has no objects"):
        converted(src, tmp_path / "out")


# --- XML ------------------------------------------------------------------------------------------


def numbered(points) -> str:
    return "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(points, 1))


def an_object(name: str, inside: str) -> str:
    corners = "<xmin>11</xmin><ymin>9</ymin><xmax>40</xmax><ymax>30</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox>{inside}</object>"


def xml(filename: str, objects: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    return (
        f"<annotation><folder>x</folder><filename>{filename}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>"
    )


def test_polygons_of_roboflow_s_folders(tmp_path):
    src = tmp_path / "src"
    for folder in ("train", "valid"):
        picture(src / folder / "a.jpg")
        # the order of the elements is not that of the points
        points = f"<polygon>{numbered(CORNERS)}</polygon>"
        text(src / folder / "a.xml", xml("a.jpg", an_object("dog", points)))
    converted(src, tmp_path / "out")
    for split in ("train", "val"):
        np.testing.assert_array_equal(only(tmp_path / "out", split), l_shape())


def test_supervision_counts_from_one(tmp_path):
    src = tmp_path / "src"
    picture(src / "JPEGImages/a.jpg")
    polygon = f"<polygon>{numbered([(x + 1, y + 1) for x, y in CORNERS])}</polygon>"
    source = "<source><database>roboflow.ai</database></source>"
    text(src / "Annotations/a.xml", xml("a.jpg", source + an_object("dog", polygon)))
    converted(src, tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def test_an_image_that_was_renamed_with_its_label(tmp_path):
    src = tmp_path / "src"
    picture(src / "a.jpg")
    polygon = f"<polygon>{numbered(CORNERS)}</polygon>"
    text(src / "a.xml", xml("DSC_0001.JPG", an_object("dog", polygon)))
    done = converted(src, tmp_path / "out")
    assert noted(done, "name of their label file") == ["a.xml: 'DSC_0001.JPG' is not there"]
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())
    text(src / "a.xml", xml("x" * 999, an_object("dog", polygon)))
    assert len(noted(converted(src, tmp_path / "out"), "name of their label file")) == 1


def test_parts_points_and_lists(tmp_path):
    src = tmp_path / "src"
    picture(src / "JPEGImages/a.jpg")
    picture(src / "JPEGImages/b.jpg")
    second = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in [(60, 40), (70, 40), (70, 50), (60, 50)])
    shapes = f"<polygon>{numbered(CORNERS)}</polygon><polygon>{second}</polygon>"
    text(src / "Annotations/a.xml", xml("a.jpg", an_object("dog", shapes)))
    text(src / "Annotations/b.xml", xml("b.jpg", ""))
    text(src / "ImageSets/Main/train.txt", "a\nb\n")
    done = converted(src, tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape() | box(60, 40, 70, 50))
    assert noted(done, "images without an object") == ["Annotations/b.xml"]


def test_boxes_of_xml_are_refused_and_rectangles_on_request(tmp_path):
    src = tmp_path / "src"
    picture(src / "a.jpg")
    text(src / "a.xml", xml("a.jpg", an_object("dog", "")))
    with pytest.raises(InputError, match=r"a\.xml: object 1: a box without a <polygon>"):
        converted(src, tmp_path / "out")
    converted(src, tmp_path / "out", "boxes=rectangles")
    # VOC counts from 1 and includes the last pixel
    np.testing.assert_array_equal(only(tmp_path / "out"), box(10, 8, 40, 30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", r"a\.xml:1: not valid XML"),
        (xml("a.jpg", an_object("", "")), "object 1: a <name> is expected"),
        (xml("a.jpg", an_object("x", "<polygon><x1>1</x1><y1>1</y1><x2>4</x2></polygon>")), "2 x and 1 y"),
        (xml("a.jpg", an_object("x", "<polygon><x1>?</x1></polygon>")), "'\\?' is no number"),
        (
            xml("a.jpg", an_object("x", f"<polygon>{numbered([(1, 1), (2, 2), (900, 3)])}</polygon>")),
            "far outside",
        ),
        (xml("a.jpg", "", (33, 44)), "its size is given as 33x44, but the image is 80x60"),
        (xml("a.jpg", "", ("many", 44)), "<width> is 'many'"),
    ],
)
def test_wrong_xml_is_named(tmp_path, content, message):
    picture(tmp_path / "src/a.jpg")
    text(tmp_path / "src/a.xml", content)
    with pytest.raises(InputError, match=message):
        converted(tmp_path / "src", tmp_path / "out", "form=voc")
