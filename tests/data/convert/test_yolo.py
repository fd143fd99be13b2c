"""YOLO segmentation as Ultralytics, Roboflow and Label Studio write it."""

import json
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
    text,
)


def line(label: int, points) -> str:
    """A line as Ultralytics writes it: six digits."""
    return " ".join([str(label), *(f"{v:.6g}" for x, y in points for v in (x / WIDTH, y / HEIGHT))])


L = line(1, CORNERS)


def a_set(
    root: Path, description: str = "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"
) -> Path:
    for split in ("train", "val"):
        for number in range(2):
            picture(root / f"images/{split}/{split}{number}.png", seed=number)
            text(root / f"labels/{split}/{split}{number}.txt", L + "\n")
    text(root / "data.yaml", description)
    return root


def test_polygons_keep_their_pixels_classes_and_splits(tmp_path):
    done = converted(a_set(tmp_path / "src"), tmp_path / "out")
    assert done.classes == ("cat", "dog")
    assert [(w.split, w.images, w.objects) for w in done.splits] == [("train", 2, 2), ("val", 2, 2)]
    for split in ("train", "val"):
        found = objects(tmp_path / "out", split)
        assert list(found) == [f"{split}0.png", f"{split}1.png"]
        for [(name, pixels)] in found.values():
            assert name == "dog"
            np.testing.assert_array_equal(pixels, l_shape())
        assert (tmp_path / "out" / split / f"{split}0.png").samefile(
            tmp_path / f"src/images/{split}/{split}0.png"
        )


def test_the_parts_and_the_hole_of_an_object_that_ultralytics_joined(tmp_path):
    # a ring as outer border, a line in, the hole the other way round, the line back; and a second part
    ring = [
        (10, 10),
        (40, 10),
        (40, 40),
        (10, 40),
        (10, 10),
        (20, 20),
        (20, 30),
        (30, 30),
        (30, 20),
        (20, 20),
    ]
    second = [(10, 10), (50, 50), (60, 50), (60, 55), (50, 55), (50, 50), (10, 10)]
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", line(0, ring + second))
    text(src / "labels/train/train1.txt", "")
    converted(src, tmp_path / "out")
    expected = (box(10, 10, 40, 40) & ~box(20, 20, 30, 30)) | box(50, 50, 60, 55)
    # lines without a width have no pixels
    np.testing.assert_array_equal(only(tmp_path / "out"), expected)


def test_a_curve_stays_within_half_a_pixel(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    points = np.stack([40 + 20 * np.cos(angles), 30 + 15 * np.sin(angles)], 1)
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", line(0, points.tolist()))
    text(src / "labels/train/train1.txt", "")
    converted(src, tmp_path / "out")
    # pycocotools decides on pixels that the border touches: about its length of 110 pixels of 942, half wrong
    # at worst
    assert iou(only(tmp_path / "out"), ellipse(40, 30, 20, 15)) > 1 - 0.5 * 110 / 942


def test_points_between_pixels_stay_where_they_are(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", "0 0.13125 0.14 0.7 0.14 0.7 0.5\n")
    converted(src, tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    # 0.14 * 60 is 8.400000000000002 in floating point
    assert content["annotations"][0]["segmentation"] == [[10.5, 8.4, 56.0, 8.4, 56.0, 30.0]]


@pytest.mark.parametrize(
    ("description", "layout"),
    [
        ("path: ../src\ntrain: images/train\nval: images/val\nnames: [cat, dog]\nnc: 2\n", "images/{}"),
        ("path: ../datasets/gone\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n", "images/{}"),
        ("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n", "{}/images"),
        ("train: train.txt\nvalidation: [val.txt]\nnames: {0: cat, 1: dog}\n", "images/{}"),
        ("train: images\\train\nval: images\\val\nnames: {0: cat, 1: dog}\n", "images/{}"),
        ("train: [images/train]\nval: images/val\nnc: 2\n", "images/{}"),
    ],
    ids=["path", "path of another machine", "roboflow", "lists", "windows", "no names"],
)
def test_layouts_of_data_yaml(tmp_path, description, layout):
    src = tmp_path / "src"
    for split in ("train", "val"):
        folder = layout.format("valid" if split == "val" and layout.startswith("{") else split)
        file = picture(src / folder / f"{split}.png")
        text(Path(str(file.with_suffix(".txt")).replace("images", "labels")), L)
        text(src / f"{split}.txt", f"./{folder}/{split}.png\n")
    text(src / "data.yaml", description)
    converted(src / "data.yaml", tmp_path / "out")
    for split in ("train", "val"):
        assert list(objects(tmp_path / "out", split)) == [f"{split}.png"]
        np.testing.assert_array_equal(only(tmp_path / "out", split), l_shape())


def test_label_studio_has_classes_txt_and_no_split(tmp_path):
    src = tmp_path / "src"
    picture(src / "images/ab12-x.png")
    text(src / "labels/ab12-x.txt", L)
    text(src / "classes.txt", "cat\ndog\n")
    text(src / "notes.json", '{"categories": [], "info": {}}')
    done = converted(src, tmp_path / "out")
    assert done.without_split
    assert "no split: all images are in instances_train.json" in "\n".join(done.lines())
    assert [w.split for w in done.splits] == ["train"]
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def test_a_test_split_stays_one_and_a_missing_one_is_noted(tmp_path):
    base = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
    src = a_set(tmp_path / "src", base + "test: images/test\n")
    assert noted(converted(src, tmp_path / "out"), "splits without files") == [
        "data.yaml:4: 'test' is images/test, which is not there"
    ]
    picture(src / "images/test/a.png")
    text(src / "labels/test/a.txt", L)
    done = converted(src, tmp_path / "with")
    assert [(w.split, w.images) for w in done.splits] == [("train", 2), ("val", 2), ("test", 1)]


def test_the_rotation_of_exif_is_applied_as_ultralytics_does(tmp_path):
    src = a_set(tmp_path / "src")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(np.rot90(upright)).save(src / "images/train/turned.jpg", exif=exif)
    text(src / "labels/train/turned.txt", L)
    converted(src, tmp_path / "out")
    [(_, pixels)] = objects(tmp_path / "out")["turned.jpg"]
    np.testing.assert_array_equal(pixels, l_shape())


def test_what_is_odd_is_noted_and_what_is_empty_is_kept(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", f"{L}\n\n{L}\n1.0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 1.005\n")
    text(src / "labels/train/train1.txt", "")
    picture(src / "images/train/unlabelled.png")
    text(src / "labels/train/lost.txt", L)
    (src / "images/train/._train0.png").write_bytes(b"\0\5\x16\7")
    text(src / "__MACOSX/x.txt", "")
    text(src / "labels/train/Thumbs.db", "")
    done = converted(src, tmp_path / "out")
    assert noted(done, "there twice") == ["labels/train/train0.txt:3"]
    assert noted(done, "outside of 0..1") == ["labels/train/train0.txt:4"]
    assert noted(done, "label file is empty") == ["labels/train/train1.txt"]
    assert noted(done, "no label file") == ["images/train/unlabelled.png"]
    assert noted(done, "without an image") == ["labels/train/lost.txt"]
    assert len(noted(done, "litter")) == 3
    found = objects(tmp_path / "out")
    assert {name: len(listed) for name, listed in found.items()} == {
        "train0.png": 2,
        "train1.png": 0,
        "unlabelled.png": 0,
    }


def test_boxes_are_refused_and_rectangles_on_request(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", f"{L}\n0 0.5 0.5 0.25 0.5\n")
    with pytest.raises(InputError, match=r"labels/train/train0\.txt:2: a box, but a polygon"):
        converted(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = converted(src, tmp_path / "out", "boxes=rectangles")
    assert noted(done, "rectangles") == ["labels/train/train0.txt:2"]
    [_, (name, pixels)] = objects(tmp_path / "out")["train0.png"]
    assert name == "cat"
    np.testing.assert_array_equal(pixels, box(30, 15, 50, 45))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("2 0.1 0.1 0.2 0.1 0.2 0.2", "train0.txt:1: class 2, but the data set has 0 to 1"),
        ("-1 0.1 0.1 0.2 0.1 0.2 0.2", "class -1"),
        ("0.5 0.1 0.1 0.2 0.1 0.2 0.2", "class 0.5"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "7 numbers behind the class"),
        ("0 0.1", "1 numbers behind the class"),
        (
            "0 10 10 40 10 40 30",
            "a coordinate of 10; 0..1 of the image's size is expected: these look like pixels",
        ),
        ("0 0.1 0.1 nan 0.1 0.2 0.2", "'nan' is no finite number"),
        ("0 0.1 0.1 x 0.1 0.2 0.2", "'x' is no number"),
        ("cat 0.1 0.1 0.2 0.1 0.2 0.2", "'cat' is no number"),
        ("0,0.1,0.1,0.2,0.1,0.2,0.2", "is no number; a line is: class x y x y x y"),
    ],
)
def test_wrong_lines_are_named(tmp_path, label, message):
    src = a_set(tmp_path / "src")
    text(src / "labels/train/train0.txt", label)
    with pytest.raises(InputError) as caught:
        converted(src, tmp_path / "out")
    assert message in str(caught.value)
    assert "labels/train/train0.txt:1" in str(caught.value)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            "train: images/train\nval: images/nowhere\nnames: [a, b]\n",
            r"data.yaml:2: 'val': there is no images/nowhere",
        ),
        ("train: images/train\nval: images/val\nnames: [a, a]\n", "classes 0 and 1 are both called 'a'"),
        ("train: images/train\nval: images/val\nnames: {0: a, 2: b}\n", "class numbers 0 to 1 are expected"),
        ("train: images/train\nval: images/val\nnames: [a, b]\nnc: 3\n", "data.yaml:4: 'nc' is 3"),
        (
            "train: images/train\nval: images/val\nnames: [a, b]\nkpt_shape: [17, 3]\n",
            "data.yaml:4: a data set of key",
        ),
        (f"train: {'x' * 999}\nval: images/val\nnames: [a, b]\n", "data.yaml:1: 'train': there is no xxx"),
        ("train: 5\nval: images/val\nnames: [a, b]\n", "'train': a folder or a list"),
        ("train: images/train\nval: images/val\nnames: [a, b\n", "not valid YAML"),
    ],
)
def test_wrong_descriptions_are_named(tmp_path, description, message):
    src = a_set(tmp_path / "src", description)
    with pytest.raises(InputError, match=message):
        converted(src, tmp_path / "out", "form=yolo")
    assert not (tmp_path / "out").exists()


def test_lists_of_cvat_name_a_folder_that_is_not_there(tmp_path):
    src = a_set(tmp_path / "src", "path: .\ntrain: train.txt\nval: val.txt\nnames: {0: cat, 1: dog}\n")
    for split in ("train", "val"):
        picture(src / f"images/{split}/same.png")
        text(src / f"labels/{split}/same.txt", L)
        text(src / f"{split}.txt", f"data/images/{split}/same.png\n")
    done = converted(src, tmp_path / "out")
    assert len(noted(done, "in another folder")) == 2
    for split in ("train", "val"):
        assert (tmp_path / "out" / split / "same.png").samefile(src / f"images/{split}/same.png")


def test_an_image_in_two_splits_is_noted(tmp_path):
    src = a_set(tmp_path / "src", "train: all.txt\nval: images/val\nnames: [cat, dog]\n")
    text(src / "all.txt", "./images/train/train0.png\n./images/val/val0.png\nimages/gone.png\n")
    done = converted(src, tmp_path / "out")
    assert noted(done, "two splits") == ["images/val/val0.png (train and val)"]
    assert noted(done, "are not there") == ["all.txt:3: images/gone.png"]


def test_a_damaged_image_is_named(tmp_path):
    src = a_set(tmp_path / "src")
    text(src / "images/train/train0.png", "no image")
    with pytest.raises(InputError, match=r"train0\.png: "):
        converted(src, tmp_path / "out")
    assert cv2.imread(str(src / "images/train/train1.png")) is not None
