"""VGG Image Annotator: projects of 2.x, exports as JSON and CSV, files of 1.x."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mpformer.types import InputError
from tests.data.convert.drawings import (
    CORNERS,
    box,
    converted,
    ellipse,
    iou,
    l_shape,
    noted,
    objects,
    only,
    picture,
    write_json,
)


def polygon(points=CORNERS, **attributes: object) -> dict:
    xs, ys = zip(*points)
    shape = {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}
    return {"shape_attributes": shape, "region_attributes": attributes}


def region(attributes: dict, **shape: object) -> dict:
    return {"shape_attributes": shape, "region_attributes": attributes}


def images(**regions: list) -> dict:
    """What VIA exports as JSON: images by name and size."""
    return {
        f"{name}.png1234": {"filename": f"{name}.png", "size": 1234, "regions": listed, "file_attributes": {}}
        for name, listed in regions.items()
    }


def project(listed: dict) -> dict:
    return {
        "_via_settings": {"core": {"default_filepath": "./images/"}, "project": {"name": "p"}},
        "_via_img_metadata": listed,
        "_via_attributes": {"region": {"type": {"type": "dropdown"}}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(listed),
    }


def write_csv(path: Path, listed: dict) -> Path:
    columns = ("region_shape_attributes", "region_attributes")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["filename", "file_size", "file_attributes", "region_count", "region_id", *columns])
        for image in listed.values():
            regions = image["regions"]
            for number, one in enumerate(regions or [region({})]):
                shape, attributes = (
                    json.dumps(one[k.removeprefix("region_") if "shape" in k else k]) for k in columns
                )
                out.writerow([image["filename"], 1234, "{}", len(regions), number, shape, attributes])
    return path


SHAPES = [
    polygon(type="dog"),
    region({"type": "cat"}, name="rect", x=50, y=40, width=10, height=15),
    region({"type": "cat"}, name="circle", cx=40, cy=30, r=20),
    region({"type": "cat"}, name="ellipse", cx=40, cy=30, rx=25, ry=12.5, theta=0.5),
]


def check_shapes(out: Path) -> None:
    found = objects(out)
    assert {name: len(listed) for name, listed in found.items()} == {"a.png": 4, "b.png": 0}
    names, (dog, rect, circle, oval) = zip(*found["a.png"])
    assert names == ("dog", "cat", "cat", "cat")
    np.testing.assert_array_equal(dog, l_shape())
    np.testing.assert_array_equal(rect, box(50, 40, 60, 55))
    # 0.05 pixels of the polygon's sides and half a pixel of pycocotools, along the whole border
    assert iou(circle, ellipse(40, 30, 20, 20)) > 1 - 0.55 * 126 / 1257
    assert iou(oval, ellipse(40, 30, 25, 12.5, 0.5)) > 1 - 0.55 * 121 / 982


@pytest.mark.parametrize("kind", ["project", "export", "csv", "first version"])
def test_each_file_of_via(tmp_path, kind):
    src = tmp_path / "src"
    for name in "ab":
        picture(src / f"images/{name}.png")
    listed = images(a=SHAPES, b=[])
    if kind == "csv":
        write_csv(src / "via.csv", listed)
    elif kind == "first version":
        for image in listed.values():
            image["regions"] = {str(i): one for i, one in enumerate(image["regions"])}
        write_json(src / "via.json", listed)
    else:
        write_json(src / "via.json", project(listed) if kind == "project" else listed)
    done = converted(src, tmp_path / "out")
    assert done.classes == ("cat", "dog")
    assert done.without_split
    check_shapes(tmp_path / "out")
    assert len(noted(done, "images without an object")) == 1


def test_a_project_beside_its_exports_counts_once(tmp_path):
    src = tmp_path / "src"
    for name in "ab":
        picture(src / f"{name}.png")
    listed = images(a=SHAPES, b=[])
    write_json(src / "via_project.json", project(listed))
    write_json(src / "via_export.json", listed)
    write_csv(src / "via_export.csv", listed)
    converted(src, tmp_path / "out")
    check_shapes(tmp_path / "out")
    write_json(src / "old.json", images(a=SHAPES[:3], b=[]))
    with pytest.raises(InputError, match=r"image a\.png is labelled in .*, too, and in another way"):
        converted(src, tmp_path / "other")
    converted(src / "via_project.json", tmp_path / "other")
    check_shapes(tmp_path / "other")


def test_splits_are_told_by_folders_or_by_names(tmp_path):
    src = tmp_path / "src"
    for split in ("train", "val"):  # the balloon data set
        picture(src / f"folders/{split}/a.png")
        write_json(src / f"folders/{split}/via_region_data.json", images(a=[polygon(type="dog")]))
        picture(src / f"names/images/{split}.png")
        write_json(src / f"names/via_{split}.json", images(**{split: [polygon(type="dog")]}))
    for layout in ("folders", "names"):
        done = converted(src / layout, tmp_path / layout)
        assert [(w.split, w.images, w.objects) for w in done.splits] == [("train", 1, 1), ("val", 1, 1)]


def test_the_attribute_that_names_the_class(tmp_path):
    src = tmp_path / "src"
    picture(src / "a.png")
    ticked = {"dog": True, "cat": False}
    write_json(src / "via.json", images(a=[polygon(type="x", kind=ticked), polygon(type="y", kind="cat")]))
    with pytest.raises(
        InputError, match="attributes kind, type: say which is the class, for instance class=kind"
    ):
        converted(src, tmp_path / "out")
    assert converted(src, tmp_path / "out", "class=kind").classes == ("cat", "dog")
    with pytest.raises(InputError, match=r"setting 'class=knd': no region has it; nearest: kind"):
        converted(src, tmp_path / "other", "class=knd")
    write_json(src / "via.json", images(a=[polygon(), polygon()]))
    assert converted(src, tmp_path / "none").classes == ("object",)


def test_what_is_left_out_is_noted(tmp_path):
    src = tmp_path / "src"
    picture(src / "a.png")
    picture(src / "unlisted.png")
    attributes = {"type": "x"}
    point = region(attributes, name="point", cx=1, cy=2)
    line = region(attributes, name="polyline", all_points_x=[1, 2], all_points_y=[1, 2])
    two = polygon([(1, 1), (3, 3)], type="x")
    write_json(src / "via.json", images(a=[polygon(type="x"), point, line, two], gone=[polygon(type="x")]))
    done = converted(src, tmp_path / "out")
    assert [place.split("(")[1] for place in noted(done, "enclose no area")] == ["point)", "polyline)"]
    assert len(noted(done, "less than three points")) == 1
    assert noted(done, "are not there") == ["via.json: gone.png1234: gone.png"]
    assert noted(done, "no label file lists") == ["unlisted.png"]
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


def test_the_same_name_in_two_folders_is_ambiguous(tmp_path):
    src = tmp_path / "src"
    picture(src / "one/a.png")
    picture(src / "two/a.png")
    write_json(src / "via.json", images(a=[polygon(type="x")]))
    with pytest.raises(InputError, match=r"the image 'a\.png' may be one/a\.png and two/a\.png"):
        converted(src, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (region({}, name="circle", cx=4, cy=5, r=3), "region 2: no value of 'type', which names the class"),
        (polygon(type=" "), "no value of 'type'"),
        (polygon(type={"x": True, "y": True}), "'type' has 2 values, one class is expected"),
        (region({"type": "x"}, name="circle", cx=4, cy=5), "a circle without 'r'"),
        (region({"type": "x"}, name="circle", cx=4, cy=5, r=-1), "a radius is -1"),
        (region({"type": "x"}, name="circle", cx=4, cy=5, r=1e9), "a radius of 1e.09"),
        (region({"type": "x"}, name="rect", x=1, y=1, width="5", height=3), "a number is expected, not '5'"),
        (region({"type": "x"}, name="polygon", all_points_x=[1, 2, 3], all_points_y=[1]), "3 x and 1 y"),
        (region({"type": "x"}, name="polygon", all_points_x=[1, 2, 3]), "a list of numbers is expected"),
        (region({"type": "x"}, cx=4), "a shape's 'name' is expected"),
        ({"shape_attributes": []}, "'shape_attributes' and 'region_attributes' are expected"),
        (7, "'shape_attributes' and 'region_attributes' are expected"),
        (polygon([(0, 0), (5, 5), (700, 0)], type="x"), "lies far outside"),
    ],
)
def test_wrong_regions_are_named(tmp_path, wrong, message):
    picture(tmp_path / "src/a.png")
    write_json(tmp_path / "src/via.json", images(a=[polygon(type="x"), wrong]))
    with pytest.raises(InputError, match=message) as caught:
        converted(tmp_path / "src", tmp_path / "out")
    assert "via.json: a.png1234: region 2" in str(caught.value)


def test_wrong_rows_of_a_csv_are_named(tmp_path):
    src = tmp_path / "src"
    picture(src / "a.png")
    path = write_csv(src / "via.csv", images(a=[polygon(type="x"), polygon(type="x")]))
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], rows[2].replace('""name""', "name")]))
    with pytest.raises(InputError, match=r"via\.csv:3: not JSON"):
        converted(src, tmp_path / "out")
    path.write_text("\n".join([*rows[:2], "a.png,1"]))
    with pytest.raises(InputError, match=r"via\.csv:3: a row of VIA's columns is expected"):
        converted(src, tmp_path / "out")
