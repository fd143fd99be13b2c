"""COCO's annotations: the real samples against pycocotools and the PNGs, and every kind of wrong input."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mpformer.config import Data, DataSet, Split
from mpformer.data import masks
from mpformer.data.catalog import check_same_classes, open_split
from mpformer.data.records import Polygons, Rle
from mpformer.types import ClassTable, InputError
from tests.data.folders import SQUARE, annotation, coco_folder


def quiet_coco(path):
    coco = COCO()
    coco.dataset = json.loads(path.read_text())
    coco.createIndex()
    return coco


@pytest.mark.parametrize("name", ["coco_mini", "tiny_coco"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_instances_equal_pycocotools(sample_data, name, split):
    catalog = open_split(Data(root=str(sample_data / name)), split)
    coco = quiet_coco(sample_data / name / "annotations" / f"instances_{split}2017.json")
    assert [r.image_id for r in catalog.records] == [str(i["id"]) for i in coco.dataset["images"]]
    assert [c.source_id for c in catalog.classes.classes] == sorted(coco.cats)
    assert [c.name for c in catalog.classes.classes] == [coco.cats[i]["name"] for i in sorted(coco.cats)]
    for record in catalog.records:
        expected = coco.loadAnns(coco.getAnnIds(imgIds=int(record.image_id)))
        assert {s.id for s in record.segments} == {a["id"] for a in expected}
        stacked = masks.record_masks(record)
        for segment, mask in zip(record.segments, stacked):
            source = coco.anns[segment.id]
            assert catalog.classes.classes[segment.label].source_id == source["category_id"]
            assert (segment.crowd, segment.area) == (bool(source["iscrowd"]), source["area"])
            truth = coco.annToMask(source).astype(bool)
            assert np.array_equal(mask, truth)
            assert np.array_equal(masks.segment_mask(segment, record), truth)
            assert masks.segment_rle(segment, record) == coco.annToRLE(source)


def test_real_panoptic_equals_its_pngs_and_its_detection_form(sample_data):
    """panopticapi's sample holds the same segments as run lengths, converted by its authors."""
    folder = sample_data / "coco_panoptic_sample" / "sample_data"
    place = Split(
        images="input_images", annotations="panoptic_examples.json", panoptic_masks="panoptic_examples"
    )
    dataset = DataSet(format="coco_panoptic", train=place, val=place)
    catalog = open_split(Data(root=str(folder), dataset=dataset, task="panoptic"), "val")
    assert len(catalog.classes) == 133
    assert len(catalog.classes.thing_labels) == 80
    assert [len(r.segments) for r in catalog.records] == [18, 32]
    assert [sum(s.crowd for s in r.segments) for r in catalog.records] == [1, 2]
    detection = json.loads((folder / "panoptic_coco_detection_format.json").read_text())["annotations"]
    for record, void in zip(catalog.records, (2712, 7189)):
        stacked = masks.record_masks(record)
        assert stacked.sum(0).max() == 1
        assert (~stacked.any(0)).sum() == void
        assert [m.sum() for m in stacked] == [s.area for s in record.segments]
        converted = Counter(
            (a["category_id"], coco_mask.decode(a["segmentation"]).tobytes())
            for a in detection
            if str(a["image_id"]) == record.image_id
        )
        ours = Counter(
            (
                catalog.classes.classes[s.label].source_id,
                masks.segment_mask(s, record).astype(np.uint8).tobytes(),
            )
            for s in record.segments
        )
        assert ours == converted
        for segment, mask in zip(record.segments, stacked):
            assert np.array_equal(coco_mask.decode(masks.segment_rle(segment, record)).astype(bool), mask)


def test_instance_task_on_panoptic_data_keeps_things_only(sample_data):
    folder = sample_data / "coco_panoptic_sample" / "sample_data"
    place = Split(
        images="input_images", annotations="panoptic_examples.json", panoptic_masks="panoptic_examples"
    )
    dataset = DataSet(format="coco_panoptic", train=place, val=place)
    catalog = open_split(Data(root=str(folder), dataset=dataset, task="instance"), "val")
    source = json.loads((folder / "panoptic_examples.json").read_text())
    things = {c["id"] for c in source["categories"] if c["isthing"]}
    assert len(catalog.classes) == 80
    for record, wanted in zip(catalog.records, source["annotations"]):
        listed = [(s["id"], s["category_id"]) for s in wanted["segments_info"]]
        found = [(s.id, catalog.classes.classes[s.label].source_id) for s in record.segments]
        assert found == [(identity, category) for identity, category in listed if category in things]


def test_crowd_is_never_inferred_from_run_lengths(tmp_path):
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[5:20, 7:30] = 1
    encoded = coco_mask.encode(mask)
    string = {"size": [40, 60], "counts": encoded["counts"].decode()}
    plain = {"size": [40, 60], "counts": masks.decompress_counts(encoded["counts"])}
    assert plain["counts"] == [7 * 40 + 5, *[15, 25] * 22, 15, (60 - 30) * 40 + 20]
    data = coco_folder(
        tmp_path,
        [
            annotation(1, 1, segmentation=string, iscrowd=0),
            annotation(2, 1, segmentation=plain, iscrowd=0),
            annotation(3, 2, segmentation=plain, iscrowd=1),
            annotation(900100000391, 2, segmentation=string, iscrowd=1),
        ],
    )
    first, second, third, _ = open_split(data, "train").records
    assert [s.crowd for s in first.segments] == [False, False]
    assert [s.crowd for s in second.segments] == [True, True]
    assert second.segments[1].id == 900100000391
    assert third.segments == ()
    for record in (first, second):
        for segment in record.segments:
            assert isinstance(segment.mask, Rle)
            assert np.array_equal(masks.segment_mask(segment, record), mask.astype(bool))


def test_what_tools_leave_out_is_filled_in(tmp_path):
    bare = {"id": 1, "image_id": "a", "category_id": 7, "segmentation": [SQUARE]}
    data = coco_folder(tmp_path, [bare], 1, {1: {"id": "a"}}, {"info": "unknown keys do no harm"})
    (record,) = open_split(data, "train").records
    (segment,) = record.segments
    assert (record.image_id, segment.label, segment.crowd, segment.area) == ("a", 1, False, 300.0)
    assert isinstance(segment.mask, Polygons)


def test_images_that_no_json_names_and_images_in_folders(tmp_path):
    data = coco_folder(tmp_path, images=2, image_changes={2: {"file_name": "deeper/2.png"}})
    (tmp_path / "images" / "deeper").mkdir()
    (tmp_path / "images" / "2.png").rename(tmp_path / "images" / "deeper" / "2.png")
    cv2.imwrite(str(tmp_path / "images" / "unnamed.png"), np.zeros((4, 4, 3), np.uint8))
    assert len(open_split(data, "train")) == 2


NAN = float("nan")

BAD_ANNOTATIONS = {
    "2 points": (annotation(12, 2, segmentation=[[1, 2, 3, 4]]), "polygon 1 has 2 points, at least 3"),
    "odd count": (annotation(12, 2, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "an even count of numbers"),
    "not numbers": (annotation(12, 2, segmentation=[["a"] * 6]), "a list of numbers"),
    "pairs": (annotation(12, 2, segmentation=[[[1, 2], [3, 4], [5, 6]]]), "polygon 1 is a list of pairs"),
    "nested": (annotation(12, 2, segmentation=[[[1, 2, 3], [3, 4, 5]]]), "an even count of numbers"),
    "flat": (annotation(12, 2, segmentation=SQUARE), r"one flat list; wrap it: \[\[x, y, \.\.\.\]\]"),
    "category name": (annotation(12, 2, category_id="dog"), "'dog', an integer .*; the id of 'dog' is 7"),
    "NaN": (annotation(12, 2, segmentation=[SQUARE, [1, 2, NAN, 4, 5, 6]]), "polygon 2 has a coordinate"),
    "far outside": (annotation(12, 2, segmentation=[[1, 2, 1e9, 4, 5, 6]]), "far outside the 60x40 image"),
    "empty": (annotation(12, 2, segmentation=[]), "'segmentation' is empty"),
    "none": (annotation(12, 2, segmentation=None), "no 'segmentation'"),
    "category": (annotation(12, 2, category_id=8), r"unknown category 8; nearest: 7 \(dog\)"),
    "category text": (annotation(12, 2, category_id="cat"), "'category_id' is 'cat'"),
    "crowd": (annotation(12, 2, iscrowd=2), "'iscrowd' is 2, 0 or 1"),
    "area": (annotation(12, 2, area="big"), "'area' is 'big'"),
    "id": (annotation("x", 2), "'id' is 'x'"),
    "huge id": (annotation(2**63, 2), "below 2\\^63"),
    "duplicate id": (annotation(11, 2), "duplicate annotation id"),
    "RLE size": (
        annotation(12, 2, segmentation={"size": [60, 40], "counts": [2400]}),
        r"size \[60, 40\], but the image is \[40, 60\]",
    ),
    "RLE too short": (
        annotation(12, 2, segmentation={"size": [40, 60], "counts": [2399]}),
        "cover 2399 pixels, but the image has 2400",
    ),
    "RLE too long": (
        annotation(12, 2, segmentation={"size": [40, 60], "counts": "PPPPPP1"}),
        "compressed counts|cover",
    ),
    "RLE cut": (annotation(12, 2, segmentation={"size": [40, 60], "counts": "P"}), "the middle of a number"),
    "RLE characters": (annotation(12, 2, segmentation={"size": [40, 60], "counts": "\n"}), "counts hold"),
    "RLE negative": (
        annotation(12, 2, segmentation={"size": [40, 60], "counts": [-1, 2401]}),
        "a string or a list of counts",
    ),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotation_is_an_error_that_names_it(tmp_path, case):
    bad, expected = BAD_ANNOTATIONS[case]
    data = coco_folder(tmp_path, [annotation(11, 1), bad, annotation(13, 3)])
    with pytest.raises(InputError, match=expected) as error:
        open_split(data, "train")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'train.json'}: annotation {bad['id']} (image 2): ")
    assert "\n" not in message


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotation_leaves_the_other_records_in_place(tmp_path, case):
    bad, _ = BAD_ANNOTATIONS[case]
    data = coco_folder(tmp_path, [annotation(11, 1), bad, annotation(13, 3)])
    records = open_split(data.model_copy(update={"on_bad_sample": "skip"}), "train").records
    assert [bool(r.problem) for r in records] == [False, True, False, False]
    assert [len(r.segments) for r in records][::2] == [1, 1]


BAD_FILES = {
    "annotations": ({"annotations": None}, "no 'annotations'"),
    "images": ({"images": None}, "no 'images'"),
    "categories": ({"categories": None}, "no 'categories'"),
    "no list": ({"annotations": {"a": 1}}, "'annotations': a list of objects"),
    "no images": ({"images": [], "annotations": []}, "no images: at least one"),
    "no classes": ({"categories": []}, "'categories' is empty"),
    "duplicate class": ({"categories": [{"id": 3, "name": "a"}] * 2}, r"categories\[1\]: duplicate id 3"),
    "class without name": ({"categories": [{"id": 3}]}, r"categories\[0\]: an integer 'id' and a 'name'"),
    "duplicate image": (
        {"images": [{"id": 1, "file_name": "1.png", "width": 60, "height": 40}] * 2, "annotations": []},
        r"images\[1\]: duplicate id 1",
    ),
    "image without size": (
        {"images": [{"id": 1, "file_name": "1.png", "height": 40}], "annotations": []},
        "image 1: 'width' is None",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_bad_file_is_always_an_error(tmp_path, case, on_bad_sample):
    content, expected = BAD_FILES[case]
    data = coco_folder(tmp_path, content=content).model_copy(update={"on_bad_sample": on_bad_sample})
    with pytest.raises(InputError, match=expected) as error:
        open_split(data, "train")
    assert str(tmp_path / "train.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_key_names_the_nearest(tmp_path):
    data = coco_folder(tmp_path, annotations=[])
    path = tmp_path / "train.json"
    path.write_text(path.read_text().replace('"annotations"', '"annotation"'))
    with pytest.raises(InputError, match=r"no 'annotations'.*nearest: 'annotation'"):
        open_split(data, "train")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", "C:\\b.png", "", "a\0b"]
)
def test_file_names_stay_in_the_data_folder(tmp_path, name):
    data = coco_folder(tmp_path, image_changes={2: {"file_name": name}})
    with pytest.raises(
        InputError, match=r"image 2: ('.*': the file name leaves the data folder|'file_name' is )"
    ):
        open_split(data, "train")


def test_missing_things_are_named_with_the_nearest(tmp_path):
    data = coco_folder(tmp_path, image_changes={3: {"file_name": "3.jpg"}})
    with pytest.raises(InputError, match=r"image 3: '3\.jpg': no such file in .*; nearest: 3\.png"):
        open_split(data, "train")
    with pytest.raises(InputError, match=r"no folder .*; nearest: "):
        open_split(data.model_copy(update={"root": str(tmp_path) + "x"}), "train")
    split = Split(images="images", annotations="trian.json")
    other = data.model_copy(update={"dataset": data.dataset.model_copy(update={"train": split})})
    with pytest.raises(InputError, match=r"no file .*trian\.json; nearest: .*train\.json"):
        open_split(other, "train")
    (tmp_path / "train.json").write_text('{"images": [')
    with pytest.raises(InputError, match="not valid JSON"):
        open_split(data, "train")


def panoptic_folder(root, segments, pixels, **changes):
    data = coco_folder(root, [{"image_id": 1, "file_name": "1.png", "segments_info": segments}], images=1)
    (root / "ids").mkdir()
    cv2.imwrite(str(root / "ids" / "1.png"), pixels)
    split = Split(images="images", annotations="train.json", panoptic_masks="ids")
    dataset = DataSet(format="coco_panoptic", train=split, val=split)
    return data.model_copy(update={"dataset": dataset, "task": "panoptic", **changes})


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([{"id": 0, "category_id": 3}], "segment 0: an id of 1 to 16777215"),
        ([{"id": 2**24, "category_id": 3}], "segment 16777216: an id of 1 to"),
        ([{"id": 5, "category_id": 3}] * 2, "duplicate segment id 5"),
        ([{"id": 5, "category_id": 4}], "segment 5: unknown category 4; nearest: 3"),
        (None, "no 'segments_info'"),
    ],
)
def test_bad_panoptic_segments(tmp_path, segments, expected):
    data = panoptic_folder(tmp_path, segments, np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(InputError, match=f"annotation of image 1: {expected}"):
        open_split(data, "train")


def test_instances_beside_panoptic_segments(tmp_path):
    """Other order of images, other ids among the classes; stuff in between does not shift the labels."""
    segments = [{"id": 5, "category_id": 7}]
    data = panoptic_folder(tmp_path, segments, np.full((40, 60, 3), (0, 0, 5), np.uint8))
    content = json.loads((tmp_path / "train.json").read_text())
    stuff = [{"id": 1, "name": "sky", "isthing": 0}, *content["categories"]]
    (tmp_path / "train.json").write_text(json.dumps({**content, "categories": stuff}))
    own = {
        "images": [{**content["images"][0], "id": 2}, content["images"][0]],
        "annotations": [annotation(4, 1, category_id=7), annotation(5, 2), annotation(6, 1, iscrowd=1)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(own))

    def with_instances(task="panoptic"):
        val = data.dataset.val.model_copy(update={"instances": "instances.json"})
        dataset = data.dataset.model_copy(update={"val": val})
        return data.model_copy(update={"dataset": dataset, "task": task})

    catalog = open_split(with_instances(), "val")
    assert catalog.classes.names == ("sky", "cat", "dog")
    [record] = catalog.instances
    assert (record.image_id, [(s.id, s.label, s.crowd) for s in record.segments]) == (
        "1",
        [(4, 2, False), (6, 1, True)],
    )
    assert open_split(with_instances(), "train").instances is None
    assert open_split(with_instances("semantic"), "val").instances is None
    (tmp_path / "instances.json").write_text(json.dumps({**own, "categories": [{"id": 1, "name": "sky"}]}))
    with pytest.raises(InputError, match=r"instances\.json: 'sky' \(id 1\) is no thing of the panoptic"):
        open_split(with_instances(), "val")
    (tmp_path / "instances.json").write_text(json.dumps({**own, "images": own["images"][:1]}))
    with pytest.raises(InputError, match=r"instances\.json: "):
        open_split(with_instances(), "val")


def test_panoptic_without_png_or_annotation(tmp_path):
    data = panoptic_folder(tmp_path, [], np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "ids" / "1.png").unlink()
    with pytest.raises(
        InputError, match=r"annotation of image 1: .1\.png.: no such file; the folder .*ids is empty"
    ):
        open_split(data, "train")
    content = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(InputError, match="image 1 has no annotation"):
        open_split(data, "train")
    (tmp_path / "train.json").write_text(json.dumps({**content, "annotations": content["annotations"] * 2}))
    with pytest.raises(InputError, match="image 1 has a second annotation"):
        open_split(data, "train")


def test_category_table_that_changed_between_the_splits(tmp_path):
    classes = open_split(coco_folder(tmp_path), "train").classes
    check_same_classes(classes, ClassTable.from_dict(classes.to_dict()), "val.json")
    other = [{"id": 3, "name": "cat"}, {"id": 7, "name": "horse"}]
    changed = open_split(coco_folder(tmp_path, content={"categories": other}), "train").classes
    with pytest.raises(InputError, match=r"val\.json: class 1 is 'horse' \(id 7\), but 'dog' \(id 7\)"):
        check_same_classes(classes, changed, "val.json")
    with pytest.raises(InputError, match=r"val\.json: 1 classes, but 2 are expected"):
        check_same_classes(classes, ClassTable(classes.classes[:1]), "val.json")


def test_two_images_are_never_one_file(tmp_path):
    """`2.PNG` and `2%2Epng` may each stand for 2.png, but not both."""
    changes = {1: {"file_name": "2.PNG"}, 2: {"file_name": "2%2Epng"}}
    data = coco_folder(tmp_path, image_changes=changes)
    with pytest.raises(InputError, match=r"images 1, 2 would all be images/2\.png; name each file as it is"):
        open_split(data, "train")
    one = coco_folder(tmp_path, image_changes={1: {"file_name": "1.PNG"}})
    [finding] = open_split(one, "train").findings
    assert "image 1: '1.PNG' is taken to be images/1.png" in finding.text


def test_numbers_in_other_forms_are_used_and_counted(tmp_path):
    data = coco_folder(
        tmp_path,
        [
            annotation("11", "1", category_id=3.0),
            annotation(12, 2.0, category_id=" 7 ", iscrowd="0", area="3"),
        ],
        image_changes={1: {"width": "60"}, 2: {"id": 2.0}},
    )
    catalog = open_split(data, "train")
    plain = open_split(
        coco_folder(tmp_path / "b", [annotation(11, 1), annotation(12, 2, category_id=7)]), "train"
    )
    for ours, theirs in zip(catalog.records, plain.records):
        assert (ours.image_id, ours.width) == (theirs.image_id, theirs.width)
        assert [(s.id, s.label) for s in ours.segments] == [(s.id, s.label) for s in theirs.segments]
    [finding] = catalog.findings
    assert (finding.count, "train.json: image 1: 'width' '60' is taken as 60" in finding.text) == (8, True)
    for wrong in (1.5, "1.5", "one", True, [1], {}):
        with pytest.raises(InputError, match="annotation"):
            open_split(coco_folder(tmp_path, [annotation(11, 1, category_id=wrong)]), "train")
