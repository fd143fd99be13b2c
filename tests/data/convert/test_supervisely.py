"""Supervisely projects: bitmaps, polygons with holes, rectangles; data sets and tags as splits."""

from pathlib import Path

import numpy as np
import pytest

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
    png_text,
    ring_and_dot,
    write_json,
)

META = {
    "classes": [
        {"title": "zebra", "shape": "bitmap", "color": "#FF0000"},
        {"title": "ant", "shape": "polygon", "color": "#00FF00"},
        {"title": "joint", "shape": "point", "color": "#0000FF"},
        {"title": "box", "shape": "rectangle", "color": "#0000FF"},
    ],
    "tags": [],
}


def bitmap(mask: np.ndarray, mode: str = "P", *, packed: bool = True, title: str = "zebra") -> dict:
    """The object cut out along its box, as Supervisely stores it."""
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    part = mask[y : ys.max() + 1, x : xs.max() + 1]
    data = png_text(part, mode, packed=packed)
    return {"classTitle": title, "geometryType": "bitmap", "bitmap": {"data": data, "origin": [x, y]}}


def polygon(outer=CORNERS, *holes, title: str = "ant") -> dict:
    points = {"exterior": [list(p) for p in outer], "interior": [[list(p) for p in hole] for hole in holes]}
    return {"classTitle": title, "geometryType": "polygon", "points": points, "bitmap": None, "tags": []}


def rectangle(x0, y0, x1, y1) -> dict:
    points = {"exterior": [[x0, y0], [x1, y1]], "interior": []}
    return {"classTitle": "box", "geometryType": "rectangle", "points": points}


def an_image(folder: Path, *given, name: str = "a.png", tags: tuple[str, ...] = (), **more) -> None:
    picture(folder / "img" / name)
    content = {
        "description": "",
        "tags": [{"name": tag, "value": None} for tag in tags],
        "size": {"height": HEIGHT, "width": WIDTH},
        "objects": list(given),
    }
    write_json(folder / "ann" / f"{name}.json", {**content, **more})


def a_project(root: Path, *given, dataset: str = "ds0", **more) -> Path:
    write_json(root / "meta.json", META)
    an_image(root / dataset, *given, **more)
    return root


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1"])
def test_a_bitmap_keeps_holes_and_parts(tmp_path, mode, packed):
    mask = ring_and_dot()
    src = a_project(tmp_path / "src", bitmap(mask, mode, packed=packed))
    done = converted(src, tmp_path / "out")
    assert done.classes == ("zebra", "ant", "box")
    np.testing.assert_array_equal(only(tmp_path / "out"), mask)


def test_a_polygon_its_holes_and_a_rectangle(tmp_path):
    holes = [[(28, 12), (36, 12), (36, 18), (28, 18)], [(30, 22), (34, 22), (34, 26), (30, 26)]]
    src = a_project(tmp_path / "src", polygon(), polygon(CORNERS, *holes), rectangle(50, 40, 59, 54))
    done = converted(src, tmp_path / "out")
    [[plain, holed, rect]] = objects(tmp_path / "out").values()
    np.testing.assert_array_equal(plain[1], l_shape())
    np.testing.assert_array_equal(holed[1], l_shape() & ~box(28, 12, 36, 18) & ~box(30, 22, 34, 26))
    np.testing.assert_array_equal(rect[1], box(50, 40, 60, 55))  # the last pixel belongs to it
    assert noted(done, "classes whose shapes") == ["joint (point)"]


def test_a_bitmap_over_the_border_is_cut(tmp_path):
    given = bitmap(box(70, 50, 80, 60))
    given["bitmap"]["origin"] = [75, -4]
    done = converted(a_project(tmp_path / "src", given), tmp_path / "out")
    np.testing.assert_array_equal(only(tmp_path / "out"), box(75, 0, 80, 6))
    assert noted(done, "cut at the image's border") == ["ds0/ann/a.png.json: object 1"]


def test_data_sets_are_splits(tmp_path):
    src = a_project(tmp_path / "src", polygon(), dataset="train")
    an_image(src / "val", polygon())
    done = converted(src, tmp_path / "out")
    assert [(w.split, w.images) for w in done.splits] == [("train", 1), ("val", 1)]


def test_tags_are_splits_where_every_image_has_one(tmp_path):
    src = a_project(tmp_path / "src", polygon(), tags=("train", "sunny"))
    an_image(src / "ds0", polygon(), name="b.png", tags=("val",))
    an_image(src / "ds1", polygon(), name="a.png", tags=("train",))
    done = converted(src, tmp_path / "out")
    assert [(w.split, w.images) for w in done.splits] == [("train", 2), ("val", 1)]
    assert list(objects(tmp_path / "out")) == ["ds0/img/a.png", "ds1/img/a.png"]
    an_image(src / "ds1", polygon(), name="c.png")
    assert converted(src, tmp_path / "other").without_split


def test_what_is_left_out_is_noted_and_old_names_are_found(tmp_path):
    point = {"classTitle": "joint", "geometryType": "point", "points": {"exterior": [[1, 2]], "interior": []}}
    src = a_project(tmp_path / "src", polygon(), point, polygon([(1, 1), (2, 2)]))
    (src / "ds0/ann/a.png.json").rename(src / "ds0/ann/a.json")
    an_image(src / "ds0", name="empty.png")
    an_image(src / "ds0", polygon(), name="gone.png")
    (src / "ds0/img/gone.png").unlink()
    picture(src / "ds0/img/unlabelled.png")
    done = converted(src, tmp_path / "out")
    assert noted(done, "shapes that enclose no area") == ["ds0/ann/a.json: object 2 (point)"]
    assert noted(done, "less than three points") == ["ds0/ann/a.json: object 3"]
    assert noted(done, "images without an object") == ["ds0/ann/empty.png.json"]
    assert noted(done, "without their image") == ["ds0/ann/gone.png.json"]
    assert noted(done, "without a label file") == ["ds0/img/unlabelled.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (polygon(title="zebr"), "object 1: no class 'zebr'; nearest: 'zebra'"),
        ({"geometryType": "polygon"}, "object 1: a 'classTitle' is expected"),
        (4, "object 1: a 'classTitle' is expected"),
        ({"classTitle": "ant", "geometryType": "polygon"}, "'points' with an 'exterior' are expected"),
        ({**polygon(), "points": {"exterior": [[1, 2, 3]]}}, "a point has 3 numbers"),
        ({**polygon(), "points": {"exterior": [[1, 2]] * 3, "interior": 5}}, "'interior': a list of holes"),
        (
            {"classTitle": "zebra", "geometryType": "bitmap", "bitmap": 5},
            "a 'bitmap' with 'data' and 'origin'",
        ),
        ({**bitmap(box(1, 1, 3, 3)), "bitmap": {"data": "", "origin": [1.5, 2]}}, "two whole numbers"),
        ({**bitmap(box(1, 1, 3, 3)), "bitmap": {"data": "AAAA", "origin": [1, 2]}}, "the bitmap is damaged"),
        (bitmap(np.ones((90, 90), bool)), "a mask of 90x90 pixels, at most 80x60 fit"),
        (rectangle(1, 2, 5, 900), "lies far outside"),
    ],
)
def test_wrong_objects_are_named(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message) as caught:
        converted(a_project(tmp_path / "src", wrong), tmp_path / "out")
    assert "ds0/ann/a.png.json" in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"classes": [*META["classes"], META["classes"][0]]}, "classes 0 and 4 are both called 'zebra'"),
        ({**META, "projectType": "videos"}, r"meta\.json: a project of videos; images are expected"),
        ({"classes": []}, "'classes': a list with at least one class"),
        ({"classes": [{"title": "a"}]}, "class 0: a 'title' and a 'shape' are expected"),
    ],
)
def test_wrong_classes_are_named(tmp_path, meta, message):
    src = a_project(tmp_path / "src", polygon())
    write_json(src / "meta.json", meta)
    with pytest.raises(InputError, match=message):
        converted(src, tmp_path / "out", "form=supervisely")


def test_another_size_than_the_image_s_is_named(tmp_path):
    src = a_project(tmp_path / "src", polygon(), size={"height": 5, "width": 6})
    with pytest.raises(InputError, match="its size is given as 6x5, but the image is 80x60"):
        converted(src, tmp_path / "out")
