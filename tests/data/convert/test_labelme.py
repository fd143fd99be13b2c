"""LabelMe 4 and 5: polygons, rectangles, circles, bitmaps, groups, embedded images."""

import base64
from pathlib import Path

import cv2
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
    ellipse,
    iou,
    l_shape,
    noted,
    objects,
    only,
    picture,
    png_text,
    ring_and_dot,
    write_json,
)


def shape(label: str, points, kind: str = "polygon", **more) -> dict:
    given = [[float(x), float(y)] for x, y in points]
    return {
        "label": label,
        "points": given,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
        **more,
    }


def a_file(folder: Path, *shapes, name: str = "a", **more) -> Path:
    picture(folder / f"{name}.png")
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": f"{name}.png",
        "imageData": None,
    }
    return write_json(
        folder / f"{name}.json", {**content, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more}
    )


def test_polygons_and_rectangles(tmp_path):
    a_file(tmp_path / "src", shape("dog", CORNERS), shape("cat", [(50, 55), (44, 41)], "rectangle"))
    done = converted(tmp_path / "src", tmp_path / "out")
    assert done.classes == ("cat", "dog")
    assert done.without_split
    [[dog, cat]] = objects(tmp_path / "out").values()
    assert (dog[0], cat[0]) == ("dog", "cat")
    np.testing.assert_array_equal(dog[1], l_shape())
    np.testing.assert_array_equal(cat[1], box(44, 41, 50, 55))


def test_a_circle_is_its_centre_and_a_point_on_it(tmp_path):
    a_file(tmp_path / "src", shape("x", [(40, 30), (40 + 12, 30 + 16)], "circle"))
    converted(tmp_path / "src", tmp_path / "out")
    # the sides of the polygon stay within 0.05 pixels; what pycocotools makes of a border is half a pixel
    assert iou(only(tmp_path / "out"), ellipse(40, 30, 20, 20)) > 1 - 0.55 * 126 / 1257


def test_a_circle_that_reaches_over_the_border(tmp_path):
    a_file(tmp_path / "src", shape("x", [(2, 3), (2, 53)], "circle"))
    converted(tmp_path / "src", tmp_path / "out")
    expected = ellipse(2, 3, 50, 50)
    assert iou(only(tmp_path / "out"), expected) > 1 - 0.55 * 80 / expected.sum()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA"])
def test_a_mask_keeps_holes_and_parts(tmp_path, mode):
    mask = ring_and_dot()
    ys, xs = np.nonzero(mask)
    x0, x1, y0, y1 = int(xs.min()), int(xs.max()), int(ys.min()), int(ys.max())
    a_file(
        tmp_path / "src",
        shape("x", [(x0, y0), (x1, y1)], "mask", mask=png_text(mask[y0 : y1 + 1, x0 : x1 + 1], mode)),
    )
    converted(tmp_path / "src", tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), mask)


def test_a_group_is_one_object(tmp_path):
    square = [(60, 40), (70, 40), (70, 50), (60, 50)]
    a_file(
        tmp_path / "src",
        shape("x", CORNERS, group_id=1),
        shape("x", square),
        shape("x", square, group_id=1),
        shape("y", square, group_id=1),
    )
    converted(tmp_path / "src", tmp_path / "out")
    [listed] = objects(tmp_path / "out").values()
    assert [name for name, _ in listed] == ["x", "x", "y"]
    np.testing.assert_array_equal(listed[0][1], l_shape() | box(60, 40, 70, 50))


def test_a_group_of_a_polygon_and_a_mask(tmp_path):
    mask = png_text(np.ones((5, 7), bool))
    a_file(
        tmp_path / "src",
        shape("x", CORNERS, group_id=1),
        shape("x", [(60, 40), (66, 44)], "mask", mask=mask, group_id=1),
    )
    converted(tmp_path / "src", tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape() | box(60, 40, 67, 45))


def test_the_image_in_the_file_is_used_where_it_is_the_only_one(tmp_path):
    path = a_file(tmp_path / "src", shape("x", CORNERS))
    pixels = np.random.default_rng(3).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    a_file(
        tmp_path / "src",
        shape("x", CORNERS),
        imageData=base64.b64encode(data).decode(),
        imagePath="..\\gone.png",
    )
    path.with_suffix(".png").unlink()
    done = converted(tmp_path / "src", tmp_path / "out")
    assert noted(done, "taken out of their JSON") == ["a.json"]
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out/train/a.png")), pixels)
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def test_paths_of_windows_and_other_spellings_are_found(tmp_path):
    picture(tmp_path / "src/images/a b.png")
    picture(tmp_path / "src/images/B.PNG".replace("PNG", "png"))
    labels = tmp_path / "src/labels"
    for name, given in (("one", "..\\images\\a b.png"), ("two", "b.png")):
        a_file(labels, shape("x", CORNERS), name=name, imagePath=given)
        (labels / f"{name}.png").unlink()
    done = converted(tmp_path / "src", tmp_path / "out")
    assert sorted(objects(tmp_path / "out")) == ["B.png", "a b.png"]
    assert noted(done, "spelt in another way") == ["labels/two.json: 'b.png' is images/B.png"]


def test_an_image_that_was_renamed_with_its_label(tmp_path):
    a_file(tmp_path / "src", shape("x", CORNERS), imagePath="IMG_1.png")
    done = converted(tmp_path / "src", tmp_path / "out")
    assert noted(done, "name of their label file") == ["a.json: 'IMG_1.png' is not there"]
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def test_splits_are_folders_of_these_names(tmp_path):
    a_file(tmp_path / "src/train", shape("x", CORNERS))
    a_file(tmp_path / "src/val", shape("y", CORNERS))
    done = converted(tmp_path / "src", tmp_path / "out")
    assert [(w.split, w.images) for w in done.splits] == [("train", 1), ("val", 1)]
    assert done.classes == ("x", "y")
    a_file(tmp_path / "src/more", shape("y", CORNERS), name="b")
    with pytest.raises(InputError, match=r"more/b\.json: in no split, but train/a\.json is in 'train'"):
        converted(tmp_path / "src", tmp_path / "other")


def test_what_is_left_out_is_noted(tmp_path):
    src = tmp_path / "src"
    a_file(
        src,
        shape("x", CORNERS),
        shape("x", [(1, 1)], "point"),
        shape("x", [(1, 1), (5, 5)], "line"),
        shape("x", [(1, 1), (5, 5), (9, 1)], "linestrip"),
        shape("x", [(1, 1), (5, 5)]),
        shape("x", [(1, 1), (5, 5), (9, 9)]),
        shape("__ignore__", CORNERS),
        shape("X", CORNERS),
    )
    a_file(src, name="empty")
    a_file(src, shape("x", CORNERS), name="gone")
    (src / "gone.png").unlink()
    picture(src / "unlabelled.png")
    write_json(src / "settings.json", {"a": 1})
    done = converted(src, tmp_path / "out")
    assert [place.split(" (")[1] for place in noted(done, "enclose no area")] == [
        "point)",
        "line)",
        "linestrip)",
    ]
    assert noted(done, "less than three points") == ["a.json: shape 5"]
    assert noted(done, "cover no pixel") == ["a.json: shape 6"]
    assert noted(done, "mean no object") == ["a.json: shape 7 (__ignore__)"]
    assert noted(done, "case or blanks") == ["'X', 'x'"]
    assert noted(done, "images without an object") == ["empty.json"]
    assert noted(done, "without their image") == ["gone.json: 'gone.png'"]
    assert noted(done, "not annotated yet") == ["unlabelled.png"]
    assert noted(done, "not LabelMe's") == ["settings.json"]
    assert {name: len(listed) for name, listed in objects(tmp_path / "out").items()} == {
        "a.png": 2,
        "empty.png": 0,
    }


def test_labels_of_an_image_before_its_rotation(tmp_path):
    path = a_file(tmp_path / "src", shape("x", CORNERS), imagePath="a.jpg")
    path.with_suffix(".png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "src/a.jpg", exif=exif)
    converted(tmp_path / "src", tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def box_mask(width: int, height: int) -> str:
    return png_text(np.ones((height, width), bool))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([shape("", CORNERS)], r"a\.json: shape 1: a 'label' is expected"),
        ([shape("x", CORNERS), {"label": 3}], "shape 2: a 'label' is expected"),
        ([5], "shape 1: a 'label' is expected"),
        (
            [shape("x", [(1, 2), (3, 4), (900, 5)])],
            r"shape 1: point \(900, 5\) lies far outside of the 80x60",
        ),
        ([shape("x", [(1, 2), (3, float("nan")), (4, 5)])], "finite number"),
        ([{**shape("x", CORNERS), "points": [[1, 2, 3]]}], "a point has 3 numbers"),
        ([{**shape("x", CORNERS), "points": [[], []]}], "a point has no numbers"),
        ([{**shape("x", CORNERS), "points": None}], "a list of points is expected"),
        ([{**shape("x", CORNERS), "points": [["1", 2]]}], "a number is expected, not '1'"),
        ([{**shape("x", CORNERS), "group_id": [1]}], "'group_id' is"),
        ([shape("x", [(1, 2), (3, 4), (5, 6)], "rectangle")], "a rectangle has 3 points, 2 are expected"),
        ([shape("x", [(1, 2)], "circle")], "a circle has 1 points"),
        (
            [shape("x", [(10, 20), (12, 22)], "mask", mask=box_mask(2, 3))],
            "the mask has 2x3 pixels, its box 3x3",
        ),
        (
            [shape("x", [(10, 20), (12, 22)], "mask", mask=box_mask(4, 3))],
            "a mask of 4x3 pixels, at most 3x3",
        ),
        ([shape("x", [(10, 20), (12, 22)], "mask", mask="!")], "not base64|a PNG is expected"),
        ([shape("x", [(10, 20), (12, 22)], "mask")], "base64 text is expected"),
        ([shape("x", [(1, 2), (900, 20)], "mask", mask=box_mask(3, 3))], "larger than the 80x60 image"),
    ],
)
def test_wrong_shapes_are_named(tmp_path, wrong, message):
    a_file(tmp_path / "src", *wrong)
    with pytest.raises(InputError, match=message):
        converted(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"imageHeight": 99}, r"a\.json: its size is given as 80x99, but the image is 80x60"),
        ({"imageHeight": WIDTH, "imageWidth": HEIGHT}, "given as 60x80, but the image is 80x60"),
        ({"imagePath": "gone.png", "imageData": "AAAA"}, "imageData: a PNG or a JPEG is expected"),
    ],
)
def test_wrong_files_are_named(tmp_path, more, message):
    a_file(tmp_path / "src", shape("x", CORNERS), **more)
    with pytest.raises(InputError, match=message):
        converted(tmp_path / "src", tmp_path / "out")
