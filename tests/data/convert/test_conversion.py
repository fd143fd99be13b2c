"""What holds for every form: the same bytes, nothing half, the source untouched, the next command works."""

import contextlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpformer.cli.main import main
from mpformer.data.convert import recognise
from mpformer.data.convert import write as writing
from mpformer.types import InputError
from tests.data.convert import test_labelme, test_supervisely, test_via, test_voc, test_yolo
from tests.data.convert.drawings import (
    CORNERS,
    box,
    contents,
    converted,
    l_shape,
    noted,
    objects,
    only,
    picture,
    text,
    write_json,
)
from tests.test_architecture import loaded_after


def yolo(root: Path) -> Path:
    return test_yolo.a_set(root)


def voc(root: Path) -> Path:
    return test_voc.a_set(root)


def labelme(root: Path) -> Path:
    for split in ("train", "val"):
        test_labelme.a_file(root / split, test_labelme.shape("dog", CORNERS))
    return root


def via(root: Path) -> Path:
    for split in ("train", "val"):
        picture(root / split / "a.png")
        write_json(root / split / "via.json", test_via.project(test_via.images(a=test_via.SHAPES)))
    return root


def supervisely(root: Path) -> Path:
    bitmap = test_supervisely.bitmap(l_shape())
    test_supervisely.an_image(test_supervisely.a_project(root, bitmap, dataset="train") / "val", bitmap)
    return root


FORMS = {
    yolo: "a YOLO data set",
    voc: "a Pascal VOC data set",
    labelme: "LabelMe annotations",
    via: "a VIA project",
    supervisely: "a Supervisely project",
}
form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@form
def test_twice_gives_the_same_bytes_and_the_source_stays(tmp_path, form):
    src = form(tmp_path / "src")
    before = contents(src)
    converted(src, tmp_path / "one")
    converted(src, tmp_path / "two")
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    converted(src, tmp_path / "one")
    assert first == contents(tmp_path / "one")
    assert before == contents(src)
    assert not list(tmp_path.rglob("*.partial"))


@form
def test_data_check_is_happy_with_what_is_printed(tmp_path, form, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    form(tmp_path / "a source")
    assert main(["data", "convert", "a source", "an out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "next: mpformer data check 'an out'"
    assert main(shlex.split(printed[-1])[2:]) == 0


def test_without_a_split_a_share_validates(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        test_labelme.a_file(tmp_path / "src", test_labelme.shape("dog", CORNERS), name=f"i{number}")
    assert main(["data", "convert", "src", "./-out #1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "the source tells no split: all images are in instances_train.json" in printed
    assert printed[-1] == "next: mpformer data check './-out #1'"
    assert main(shlex.split(printed[-1])[2:]) == 0
    assert "no validation split" in capsys.readouterr().out


@form
def test_each_form_is_recognised(tmp_path, form):
    assert recognise(form(tmp_path / "src")) == FORMS[form]


def test_files_are_recognised_by_their_content(tmp_path):
    assert recognise(yolo(tmp_path / "yolo") / "data.yaml") == "a YOLO data set"
    assert recognise(labelme(tmp_path / "labelme") / "val/a.json") == "LabelMe annotations"
    assert recognise(via(tmp_path / "via") / "train/via.json") == "a VIA project"
    project = supervisely(tmp_path / "supervisely")
    assert recognise(project / "meta.json") == "a Supervisely project"
    assert recognise(project / "val/ann/a.png.json") == "a Supervisely project"
    csv = test_via.write_csv(tmp_path / "x.csv", test_via.images(a=[]))
    assert recognise(csv) == "a VIA project"
    for content in (
        "",
        "[]",
        "{}",
        "{",
        "null",
        "[" * 100_000,
        '{"images": [], "annotations": [], "categories": []}',
    ):
        for suffix in ("json", "yaml", "xml", "csv"):
            assert recognise(text(tmp_path / f"x.{suffix}", content)) is None, (content[:20], suffix)
    assert recognise(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert recognise(tmp_path / "empty") is None


def test_recognising_loads_neither_cv2_nor_torch(tmp_path):
    loaded = loaded_after("from mpformer.data.convert import recognise\nrecognise('.')", tmp_path)
    assert not {"cv2", "torch", "ray", "pycocotools", "PIL"} & loaded


def test_ids_count_from_one_in_the_order_of_names(tmp_path):
    src = tmp_path / "src"
    for name in ("b", "c", "a"):
        test_labelme.a_file(
            src, test_labelme.shape("x", CORNERS), test_labelme.shape("w", CORNERS), name=name
        )
    converted(src, tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [
        (1, "a.png"),
        (2, "b.png"),
        (3, "c.png"),
    ]
    assert [a["id"] for a in content["annotations"]] == list(range(1, 7))
    assert content["categories"] == [{"id": 1, "name": "w"}, {"id": 2, "name": "x"}]
    assert content["annotations"][0]["category_id"] == 2
    assert content["annotations"][0]["bbox"] == [10, 8, 30, 22]
    assert content["annotations"][0]["area"] == l_shape().sum()


def test_an_interrupted_conversion_leaves_nothing_half_and_is_finished(tmp_path, monkeypatch):
    src = yolo(tmp_path / "src")
    converted(src, tmp_path / "whole")
    place, calls = writing._place, []

    def interrupted(image, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place(image, target)

    monkeypatch.setattr(writing, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(src, tmp_path / "out")
    assert not (tmp_path / "out/annotations").exists()
    monkeypatch.setattr(writing, "_place", place)
    converted(src, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    src = yolo(tmp_path / "src")
    monkeypatch.setattr("os.link", refuse)
    done = converted(src, tmp_path / "out")
    assert noted(done, "images copied") == ["4 files"]
    image = tmp_path / "out/train/train0.png"
    assert image.read_bytes() == (src / "images/train/train0.png").read_bytes()
    assert not image.samefile(src / "images/train/train0.png")


def test_the_output_may_lie_in_the_source(tmp_path):
    src = labelme(tmp_path / "src")
    converted(src, src / "coco")
    first = contents(src / "coco")
    converted(src, src / "coco")
    assert contents(src / "coco") == first


def test_only_an_empty_folder_or_an_earlier_conversion_is_written_to(tmp_path):
    src, other = labelme(tmp_path / "src"), labelme(tmp_path / "other")
    (tmp_path / "mine").mkdir()
    text(tmp_path / "mine/thesis.tex", "")
    for out in (src, tmp_path, tmp_path / "mine", tmp_path / "mine/thesis.tex"):
        before = contents(tmp_path)
        with pytest.raises(InputError, match=r"the source lies in it|not empty|this is a file"):
            converted(src, out)
        assert contents(tmp_path) == before
    converted(src, tmp_path / "out")
    with pytest.raises(InputError, match=r"no conversion of .*other: an empty or new folder is expected"):
        converted(other, tmp_path / "out")
    # a split that is gone does not stay behind
    for path in (src / "val").iterdir():
        path.unlink()
    converted(src, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out/annotations").iterdir()] == ["instances_train.json"]


def test_two_forms_in_one_folder_are_asked_about(tmp_path):
    src = labelme(tmp_path / "src")
    write_json(src / "train/via.json", test_via.images(a=[test_via.polygon(type="x")]))
    with pytest.raises(
        InputError, match="LabelMe annotations and a VIA project: say which, for instance form="
    ):
        converted(src, tmp_path / "out")
    done = converted(src, tmp_path / "out", "form=labelme")
    assert noted(done, "not LabelMe's") == ["train/via.json"]
    np.testing.assert_array_equal(only(tmp_path / "out"), l_shape())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("boxs=x", "setting 'boxs=x': no such setting here; nearest: boxes"),
        ("boxes=x", "setting 'boxes=x': refuse, rectangles are the choices"),
        ("form=coco", "yolo, voc, labelme, via, supervisely are the choices"),
        ("class=", "a value is expected"),
        ("class=x", "LabelMe has no such choice, VGG Image Annotator do"),
    ],
)
def test_wrong_settings_are_named(tmp_path, setting, message):
    with pytest.raises(InputError) as caught:
        converted(labelme(tmp_path / "src"), tmp_path / "out", setting)
    assert message in str(caught.value)


def test_nothing_to_convert_is_said(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(InputError, match="COCO needs no conversion: mpformer data check"):
        converted(tmp_path / "src", tmp_path / "out")
    with pytest.raises(InputError, match=r"there is no .*scr.*; nearest: .*src"):
        converted(tmp_path / "scr", tmp_path / "out")
    test_labelme.a_file(tmp_path / "src")
    with pytest.raises(InputError, match="no object with a mask in it: there is nothing to learn"):
        converted(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_one_name_in_folders_of_a_split_stay_apart(tmp_path):
    src = tmp_path / "src"
    test_labelme.a_file(src / "one", test_labelme.shape("x", CORNERS))
    test_labelme.a_file(src / "two", test_labelme.shape("x", [(1, 1), (5, 1), (5, 5), (1, 5)]))
    converted(src, tmp_path / "out")
    found = objects(tmp_path / "out")
    np.testing.assert_array_equal(found["one/a.png"][0][1], l_shape())
    np.testing.assert_array_equal(found["two/a.png"][0][1], box(1, 1, 5, 5))


def test_names_that_are_not_utf_8_are_named(tmp_path):
    src = tmp_path / "src"
    test_labelme.a_file(src, test_labelme.shape("x", CORNERS))
    picture(src / "b.png").rename(src / os.fsdecode(b"\xff.png"))
    converted(src, tmp_path / "out")
    assert "\\udcff.png" in (tmp_path / "out/conversion.txt").read_text()
    test_labelme.a_file(src, test_labelme.shape("\ud800", CORNERS))
    with pytest.raises(InputError, match=r"the class name '\\ud800' is not UTF-8: rename it"):
        converted(src, tmp_path / "other")
    yolo(tmp_path / "yolo")
    image = picture(tmp_path / "yolo/images/train/b.png")
    image.rename(image.with_name(os.fsdecode(b"\xff.png")))
    with pytest.raises(InputError, match=r"the file name '\\udcff\.png' is not UTF-8: rename it"):
        converted(tmp_path / "yolo", tmp_path / "other")


def test_a_broken_file_that_tells_no_form_is_named(tmp_path):
    src = yolo(tmp_path / "src")
    text(src / "data.yaml", "train: [images\n")
    with pytest.raises(InputError, match=r"data\.yaml:2: not valid YAML"):
        converted(src, tmp_path / "out")
    text(tmp_path / "via/via.json", '{"a": \n,}')
    with pytest.raises(InputError, match=r"via\.json:2: not valid JSON"):
        converted(tmp_path / "via", tmp_path / "out")
    text(tmp_path / "cvat/annotations.xml", "<annotations><version>1.1</version></annotations>")
    with pytest.raises(InputError, match="data found; COCO needs no conversion"):
        converted(tmp_path / "cvat", tmp_path / "out")


def test_other_files_beside_the_labels_do_no_harm(tmp_path):
    src = yolo(tmp_path / "src")
    text(src / "compose.yaml", "a: [b\n")
    text(src / "args.yaml", "task: segment\nmode: train\n")
    text(src / "README.roboflow.txt", "by Roboflow")
    assert [w.images for w in converted(src, tmp_path / "out").splits] == [2, 2]


def test_a_file_may_stand_for_its_folder(tmp_path):
    src = supervisely(tmp_path / "src")
    assert [w.images for w in converted(src / "meta.json", tmp_path / "out").splits] == [1, 1]
    done = converted(labelme(tmp_path / "one") / "train/a.json", tmp_path / "alone")
    assert [(w.split, w.images) for w in done.splits] == [("train", 1)]


def test_a_loop_of_links_is_walked_once(tmp_path):
    src = labelme(tmp_path / "src")
    (src / "train/again").symlink_to(src)
    assert [w.images for w in converted(src, tmp_path / "out").splits] == [1, 1]


# --- malformed sources ----------------------------------------------------------------------------

LABELS = {
    yolo: ["data.yaml", "labels/train/train0.txt"],
    voc: [
        "ImageSets/Segmentation/train.txt",
        "SegmentationObject/2007_000032.png",
        "SegmentationClass/2007_000032.png",
    ],
    labelme: ["train/a.json"],
    via: ["train/via.json"],
    supervisely: ["meta.json", "train/ann/a.png.json"],
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["", "x", "polygon", "mask", "a.png", "\ud800", "\0", "../a.png", "AAAA"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "points", "x"]), inner)
    ),
    max_leaves=6,
)


def attempt(src: Path, out: Path, name: str) -> None:
    """One line, or a result; never a traceback."""
    with contextlib.suppress(InputError):
        converted(src, out, f"form={name}")


def places(content: object) -> list[tuple]:
    """The paths of all values in a JSON."""
    found = [()]
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            found += [(key, *path) for path in places(value)]
    return found


def changed(content: object, path: tuple, value: object) -> object:
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def fuzz(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@form
@pytest.mark.slow
@fuzz(150)
@given(data=st.data())
def test_damaged_bytes_end_in_one_line(tmp_path_factory, form, data):
    root = tmp_path_factory.mktemp("fuzz")
    src = form(root / "src")
    file = src / data.draw(st.sampled_from(LABELS[form]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["cut", "put", "replace", "swap"]))
        if kind == "cut":
            del content[at:]
        elif kind == "put":
            content[at:at] = data.draw(st.binary(max_size=4))
        elif kind == "replace":
            content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        else:
            content[at:] = content[at:][::-1]
    file.write_bytes(content)
    attempt(src, root / "out", form.__name__)


@pytest.mark.parametrize("form", [labelme, via, supervisely], ids=lambda form: form.__name__)
@pytest.mark.slow
@fuzz(100)
@given(data=st.data())
def test_changed_values_end_in_one_line(tmp_path_factory, form, data):
    root = tmp_path_factory.mktemp("fuzz")
    src = form(root / "src")
    file = src / data.draw(st.sampled_from(LABELS[form]))
    content = json.loads(file.read_text())
    path = data.draw(st.sampled_from(places(content)))
    file.write_text(json.dumps(changed(content, path, data.draw(JSON))))
    attempt(src, root / "out", form.__name__)


@pytest.mark.slow
@fuzz(100)
@given(
    line=st.text(st.sampled_from("0123456789.-+e \tnaif,\n\u0661\x1c"), max_size=60), key=st.text(max_size=20)
)
def test_random_lines_and_descriptions_end_in_one_line(tmp_path_factory, line, key):
    root = tmp_path_factory.mktemp("fuzz")
    src = yolo(root / "src")
    text(src / "labels/train/train0.txt", line)
    attempt(src, root / "out", "yolo")
    (src / "data.yaml").write_bytes(
        f"train: {key}\nval: {line}\nnames: [a]\n".encode("utf-8", "surrogatepass")
    )
    attempt(src, root / "other", "yolo")


@pytest.mark.slow
@fuzz(200)
@given(data=st.data())
def test_random_xml_ends_in_one_line(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    picture(root / "src/a.jpg")
    word = st.sampled_from(["", "1", "-5", "nan", "1e400", "x", "a.jpg", "../a.jpg", "/", "."])
    tags = st.sampled_from(
        ["object", "name", "polygon", "x1", "y1", "pt", "x", "y", "bndbox", "xmin", "size", "width"]
    )
    element = st.recursive(
        word,
        lambda inner: st.tuples(tags, st.lists(inner, max_size=4)).map(
            lambda t: f"<{t[0]}>{''.join(t[1])}</{t[0]}>"
        ),
        max_leaves=12,
    )
    inside = "".join(data.draw(st.lists(element, max_size=5)))
    shapes = test_voc.an_object("x", f"<polygon>{test_voc.numbered(CORNERS)}{inside}</polygon>{inside}")
    text(root / "src/a.xml", test_voc.xml(data.draw(word), shapes + inside))
    attempt(root / "src", root / "out", "voc")
