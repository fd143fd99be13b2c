"""`data check` finds what was put wrong, counts like pycocotools, and a folder is understood by itself."""

import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mpformer.config import Data, LargeScaleJitter, Packed, Split, build_config
from mpformer.config.yamlfile import Source
from mpformer.data import augment
from mpformer.data.catalog import open_split
from mpformer.data.check import check, obstacle, report_text, training_command
from mpformer.data.detect import detect
from mpformer.data.pack import pack
from mpformer.data.pictures import batch_pictures, catalog_sheet, pilot_sheet
from mpformer.data.pipeline import train_batches
from mpformer.types import InputError
from tests.data.folders import SQUARE, annotation, coco_folder
from tests.data.test_coco import panoptic_folder


def kinds(report):
    return sorted({f.kind for f in report.findings})


def test_counts_of_real_data(sample_data):
    data = Data(root=str(sample_data / "tiny_coco"))
    report = check(data)["train"]
    content = json.loads((sample_data / "tiny_coco/annotations/instances_train2017.json").read_text())
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    ordinary = [a for a in content["annotations"] if not a["iscrowd"]]
    assert (report.images, report.usable) == (37, 37)
    assert (report.objects, report.crowds) == (len(ordinary), len(content["annotations"]) - len(ordinary))
    assert report.empty == 37 - len({a["image_id"] for a in ordinary})
    for found in report.classes:
        (category,) = coco.getCatIds(catNms=[found.name])
        of_class = [a for a in ordinary if a["category_id"] == category]
        assert (found.objects, found.images) == (len(of_class), len({a["image_id"] for a in of_class}))
    areas = np.array([coco_mask.area(coco.annToRLE(a)) for a in ordinary])
    assert report.by_area == (
        (areas < 1024).sum(),
        ((areas >= 1024) & (areas < 9216)).sum(),
        (areas >= 9216).sum(),
    )
    sizes = [(i["width"], i["height"]) for i in content["images"]]
    widths, heights = zip(*sizes)
    assert report.sizes == (min(widths), max(widths), min(heights), max(heights))


def test_everything_that_was_put_wrong_is_found(tmp_path):
    beyond = [50.0, 10.0, 75.0, 10.0, 75.0, 30.0, 50.0, 30.0]
    outside = [70.0, 10.0, 90.0, 10.0, 90.0, 30.0]
    line = [10.0, 10.0, 20.0, 10.0, 30.0, 10.0]
    data = coco_folder(
        tmp_path,
        [
            annotation(1, 1),
            annotation(2, 1, area=3000.0),
            annotation(3, 2, segmentation=[beyond], area=200.0),
            annotation(4, 2, segmentation=[outside], area=0.0),
            annotation(5, 2, segmentation=[line], area=0.0),
            annotation(6, 3, segmentation=[[1, 2, 3, 4]]),
            annotation(7, 5),
            annotation(8, 6, iscrowd=1),
        ],
        images=7,
        image_changes={4: {"file_name": "missing.png"}},
    )
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "7.png")
    (tmp_path / "images" / "5.png").write_bytes(b"broken")
    reports = check(data)
    report = reports["train"]
    assert "cannot be used: 6" in obstacle(reports, "error")  # both splits are the same folder
    assert obstacle(reports, "skip") is None
    by_kind = {}
    for finding in report.findings:
        by_kind.setdefault(finding.kind, []).append(finding.text)
    assert {kind: len(texts) for kind, texts in by_kind.items()} == {
        "cannot be used": 3,
        "duplicate images": 1,
        "duplicate objects": 1,
        "areas that contradict the mask": 1,
        "polygons that reach outside the image": 1,
        "objects without a pixel in the image": 2,
    }
    assert "annotation 6 (image 3): polygon 1 has 2 points" in " ".join(by_kind["cannot be used"])
    assert "'missing.png': no such file in" in " ".join(by_kind["cannot be used"])
    assert "5.png: not an image" in " ".join(by_kind["cannot be used"])
    assert by_kind["duplicate objects"][0].endswith("1.png: object 2: the same class and mask as 1")
    assert "object 2: 3000 pixels stated, 300 drawn" in by_kind["areas that contradict the mask"][0]
    assert {t[-1] for t in by_kind["objects without a pixel in the image"]} == {"4", "5"}
    assert "object 3: 15 pixels" in by_kind["polygons that reach outside the image"][0]
    assert (report.images, report.usable, report.objects, report.crowds, report.unlisted) == (7, 4, 3, 1, 1)
    text = report_text({"train": report})
    for kind in by_kind:
        assert f"{kind}: {len(by_kind[kind])}" in text


def test_the_work_on_an_image_does_not_grow_with_its_objects(tmp_path, monkeypatch):
    """Each file is read once, and the training samples' scale is drawn once per size of an image."""
    annotations = [annotation(n, 1 + n % 4) for n in range(1, 41)]
    data = coco_folder(tmp_path, annotations)
    read, placed = Counter(), Counter()
    read_bytes, place = Path.read_bytes, augment.place

    def reading(path):
        read[path.name] += 1
        return read_bytes(path)

    def placing(height, width, *arguments):
        placed[height, width] += 1
        return place(height, width, *arguments)

    monkeypatch.setattr(Path, "read_bytes", reading)
    monkeypatch.setattr(augment, "place", placing)
    reports = check(data)
    assert reports["train"].images == 4
    images = {name: times for name, times in read.items() if name.endswith((".png", ".jpg"))}
    assert set(images.values()) == {2}  # once for each split, which are of one folder here
    assert set(placed.values()) == {9}


def test_images_in_both_splits_and_tables_that_differ(tmp_path):
    data = coco_folder(tmp_path, images=2)
    content = json.loads((tmp_path / "train.json").read_text())
    content["categories"][1]["name"] = "wolf"
    (tmp_path / "val.json").write_text(json.dumps(content))
    split = Split(images="images", annotations="val.json")
    data = data.model_copy(update={"dataset": data.dataset.model_copy(update={"val": split})})
    reports = check(data)
    assert kinds(reports["train"]) == []
    assert kinds(reports["val"]) == [
        "category tables that differ",
        "duplicate images",
        "validation images that are training images",
    ]
    assert "(small train)" in next(f.text for f in reports["val"].findings if f.kind == "duplicate images")
    assert obstacle(reports, "skip").startswith("category tables that differ: small val: class 1 is 'wolf'")
    assert "no problems found" in report_text(reports)


def test_panoptic_ids_that_contradict_the_json(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10, :, 2] = 5
    pixels[10:20, :, 1] = 1
    segments = [
        {"id": 5, "category_id": 3, "area": 600},
        {"id": 9, "category_id": 7, "area": 10},
    ]
    report = check(panoptic_folder(tmp_path, segments, pixels))["train"]
    texts = {f.kind: f.text for f in report.findings}
    assert texts["ids that the annotations do not know"].endswith("ids/1.png: id 256 (image 1)")
    assert texts["objects without a pixel in the image"].endswith("object 9")


def moved(tmp_path, **places):
    """The usual small folder with its parts elsewhere."""
    coco_folder(tmp_path / "made", images=6)
    for name, where in places.items():
        target = tmp_path / "mine" / where
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tmp_path / "made" / ("images" if name.startswith("images") else "train.json")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("places", "train", "val"),
    [
        (
            {
                "a": "annotations/instances_train2017.json",
                "b": "annotations/instances_val2017.json",
                "images1": "train2017",
                "images2": "val2017",
            },
            ("train2017", "annotations/instances_train2017.json"),
            ("val2017", "annotations/instances_val2017.json"),
        ),
        (
            {
                "a": "train/_annotations.coco.json",
                "b": "valid/_annotations.coco.json",
                "images1": "train/pictures",
                "images2": "valid/pictures",
            },
            ("train/pictures", "train/_annotations.coco.json"),
            ("valid/pictures", "valid/_annotations.coco.json"),
        ),
        (
            {"a": "labels.json", "images": "data/images"},
            ("data/images", "labels.json"),
            ("data/images", "labels.json"),
        ),
    ],
)
def test_folders_are_understood(tmp_path, places, train, val):
    root = moved(tmp_path, **places)
    found = detect(root).dataset
    assert found.format == "coco_instance"
    assert (found.train.images, found.train.annotations) == train
    assert (found.val.images, found.val.annotations) == val
    splits = [open_split(Data(root=str(root), dataset=found), split) for split in ("train", "val")]
    ids = [[record.image_id for record in split.records] for split in splits]
    if "b" in places:
        assert ids == [["1", "2", "3", "4", "5", "6"]] * 2
    else:  # one JSON: each image in one split
        assert sorted(ids[0] + ids[1]) == ["1", "2", "3", "4", "5", "6"]
        assert len(ids[1]) == 2


def test_the_printed_command_gives_the_same_data(tmp_path):
    root = moved(tmp_path, a="labels.json", images="data/images")
    data = Data(root=str(root), dataset=detect(root).dataset)
    command = shlex.split(training_command(data, "laptop-instance"))
    assert command[:3] == ["mpformer", "train", "laptop-instance"]
    tree = build_config(Source(tmp_path, {}, {}).overridden(command[3:])).data
    assert tree.model_copy(update={"dataset": data.dataset}) == data
    assert (tree.dataset.train, tree.dataset.val) == (data.dataset.train, data.dataset.val)


def test_a_packed_folder_is_understood_and_damage_is_found(tmp_path):
    data = coco_folder(tmp_path / "in", [annotation(n, n) for n in range(1, 5)], images=4)
    pack(data, str(tmp_path / "out"))
    assert detect(tmp_path / "out").dataset == Packed()
    packed = Data(root=str(tmp_path / "out"), dataset=Packed())
    train = check(packed)["train"]
    assert (train.images, train.findings) == (4, ())
    assert training_command(packed, "laptop-instance").endswith(" data.dataset=packed")
    shard = tmp_path / "out" / "val" / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(bytes(content))
    found = kinds(check(packed)["val"])
    assert "shards that have changed since they were written" in found


def test_a_folder_without_annotations(tmp_path):
    (tmp_path / "notes.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="no COCO annotations in it"):
        detect(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        detect(tmp_path / "x")
    coco_folder(tmp_path, images=1)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(
        InputError, match=r"train\.json: its images, '1\.png' and the others, are in no folder"
    ):
        detect(tmp_path)


def test_a_pilot_beside_its_ground_truth(tmp_path):
    """One row: the ground truth in red, the first layer without a cell, the second with all, in blue."""
    data = coco_folder(tmp_path, [annotation(1, 1)], images=1)
    data = data.model_copy(update={"augment": LargeScaleJitter(size=(64, 96), scale=(1.0, 1.0), flip=0.0)})
    catalog = open_split(data, "train")
    (packed,) = train_batches(data, catalog, seed=0, batch_size=1, steps=range(1), rank=0, world=1)
    batch = packed.to("cpu")
    layers = {1: np.zeros((1, 1, 2 * 3), bool), 2: np.ones((1, 1, 4 * 6), bool)}
    objects, labels = np.zeros((1, 1), int), np.ones((1, 1), int)
    sheet = pilot_sheet(batch, catalog.classes, {0: 0}, objects, labels, layers).astype(int)
    truth = batch.targets[0].masks[0].numpy()[: batch.valid_sizes[0][0], : batch.valid_sizes[0][1]]
    third = sheet.shape[1] // 3
    red = (sheet[..., 0] - sheet[..., 2] > 60).sum(0)
    blue = (sheet[..., 2] - sheet[..., 0] > 60).sum(0)
    area = sheet.shape[0] * third
    assert red[:third].sum() / area == pytest.approx(truth.mean(), rel=0.25)
    assert red[third : 2 * third].sum() == pytest.approx(red[:third].sum(), rel=0.1)
    assert blue[: 2 * third].sum() == 0
    assert blue[2 * third :].sum() / area == pytest.approx(1 - truth.mean(), rel=0.25)
    assert pilot_sheet(batch, catalog.classes, {}, objects, labels, layers) is None


def test_pictures_show_every_sample(tmp_path):
    data = coco_folder(tmp_path, [annotation(1, 1), annotation(2, 2, segmentation=[SQUARE[:6]])], images=5)
    cv2.imwrite(str(tmp_path / "images" / "3.png"), np.zeros((4, 4, 3), np.uint8))
    catalog = open_split(data, "train")
    sheet = catalog_sheet(catalog)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    (batch,) = train_batches(
        data,
        catalog.__class__(catalog.name, catalog.classes, catalog.records[:2], catalog.root),
        seed=0,
        batch_size=2,
        steps=range(1),
        rank=0,
        world=1,
    )
    assert len(batch_pictures(batch.to("cpu"), catalog.classes)) == 2
