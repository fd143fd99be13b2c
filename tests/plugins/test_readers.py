"""The example readers against pixels that are known, and their errors."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mpformer.config import Config
from mpformer.data.catalog import open_split
from mpformer.data.check import check
from mpformer.data.masks import record_masks
from mpformer.data.pipeline import train_batches
from mpformer.types import InputError
from tests.plugins import folders
from tests.plugins.folders import SIZE


def data(root, reader, task="instance", **more):
    dataset = {"name": "own", "format": reader, "options": more.pop("options", {})}
    tree = {"root": str(root), "dataset": dataset, "task": task, "loader": "inline", **more}
    tree.setdefault("augment", {"size": [SIZE, SIZE]})
    return Config.model_validate({"data": tree}).data


def test_yolo_polygons_are_fractions_of_the_image(folder):
    folders.yolo(folder / "set", {"train": 3, "val": 1})
    (folder / "set" / "labels" / "train" / "2.txt").unlink()
    catalog = open_split(data(folder / "set", "yolo_reader:read"), "train")
    assert catalog.classes.names == ("disc", "blob")
    assert [[s.label for s in r.segments] for r in catalog.records] == [[0, 1], [0, 1], []]
    record = catalog.records[0]
    for line, mask in zip((folder / "set/labels/train/0.txt").read_text().splitlines(), record_masks(record)):
        points = np.array(line.split()[1:], float).reshape(-1, 2) * SIZE
        filled = cv2.fillPoly(np.zeros((SIZE, SIZE), np.uint8), [np.int32(np.round(points))], 1)
        # OpenCV also fills the pixels on the outline
        assert np.logical_and(mask, filled).sum() / np.logical_or(mask, filled).sum() > 0.85
    reports = check(data(folder / "set", "yolo_reader:read"))
    assert not reports["train"].findings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.1 0.1 0.5", "0.txt:1: 3 numbers: x and y of at least 3 points"),
        ("0 0.5 0.5 0.2 0.2", "0.txt:1: a bounding box; the polygons"),
        ("2 0.1 0.1 0.5 0.1 0.5 0.5", "0.txt:1: class 2: 0 to 1 are expected"),
        ("0 10 10 50 10 50 50", "0.txt:1: coordinates are fractions"),
        ("disc 0.1 0.1 0.5 0.1 0.5 0.5", "0.txt:1: a class and numbers"),
    ],
)
def test_a_wrong_yolo_label_is_named_with_its_line(folder, line, message):
    folders.yolo(folder / "set", {"train": 1, "val": 1})
    (folder / "set/labels/train/0.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        open_split(data(folder / "set", "yolo_reader:read"), "train")
    skipping = open_split(data(folder / "set", "yolo_reader:read", on_bad_sample="skip"), "train")
    assert "0.txt:1" in skipping.records[0].problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("names: ", "classes: "), "data.yaml: no 'names'; nearest: 'classes'"),
        (("images/train", "pictures/train"), "train: a folder of .* expected, not 'pictures/train'"),
        (("images/train", "../images"), "leaves the data folder"),
        (("{0: disc, 1: blob}", "{1: disc, 2: blob}"), "names: a list, or a mapping from 0"),
    ],
)
def test_a_wrong_yolo_file_is_one_error(folder, change, message):
    folders.yolo(folder / "set", {"train": 1, "val": 1})
    path = folder / "set" / "data.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        open_split(data(folder / "set", "yolo_reader:read"), "train")


def png(root, folder, name):
    return np.array(Image.open(root / folder / f"{name}.png"))


def test_voc_objects_are_those_of_the_png_with_the_classes_of_the_xml(folder):
    folders.voc(folder / "voc", {"train": 3, "val": 2})
    catalog = open_split(data(folder / "voc", "voc_reader:read"), "train")
    assert len(catalog.classes) == 20
    assert catalog.classes.names[7] == "cat"
    for record in catalog.records:
        ids = png(folder / "voc", "SegmentationObject", record.image_id)
        names = [(catalog.classes.names[s.label], s.crowd) for s in record.segments]
        assert names == [("cat", False), ("dog", True)]
        assert np.array_equal(record_masks(record), np.stack([ids == 1, ids == 2]))
    reports = check(data(folder / "voc", "voc_reader:read"))
    assert not reports["train"].findings


def test_voc_classes_are_those_of_the_other_png(folder):
    folders.voc(folder / "voc", {"train": 1, "val": 1})
    catalog = open_split(data(folder / "voc", "voc_reader:read", "semantic"), "val")
    (record,) = catalog.records
    ids = png(folder / "voc", "SegmentationClass", record.image_id)
    assert [catalog.classes.names[s.label] for s in record.segments] == ["background", "cat", "dog"]
    assert np.array_equal(record_masks(record), np.stack([ids == 0, ids == 8, ids == 12]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("<name>cat", "<name>kitten"), "train_0.xml: object 1: 'kitten' is none of the classes"),
        (("<width>64", "<width>65"), "train_0.png: 64x64 pixels, but .*train_0.xml has 65x64"),
        (("</annotation>", ""), "train_0.xml: not a VOC annotation"),
        (("<xmin>3</xmin>", "<xmin>60</xmin>"), "train_0.png: object 1 lies outside of its box"),
        (("<xmin>3</xmin>", ""), "train_0.xml: not a VOC annotation with sizes and boxes"),
    ],
)
def test_what_is_wrong_with_a_voc_image_is_its_problem(folder, change, message):
    folders.voc(folder / "voc", {"train": 1, "val": 1})
    path = folder / "voc" / "Annotations" / "train_0.xml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    catalog = open_split(data(folder / "voc", "voc_reader:read"), "train")
    with pytest.raises(InputError, match=message):
        next(batches(data(folder / "voc", "voc_reader:read"), catalog))


def test_a_voc_split_that_is_not_there_is_named(folder):
    with pytest.raises(InputError, match=r"val.txt: cannot be read: No such file"):
        open_split(data(folder, "voc_reader:read"), "val")


def batches(settings, catalog, world=1, rank=0):
    return train_batches(settings, catalog, seed=3, batch_size=2, steps=range(3), rank=rank, world=world)


def test_an_augmentation_of_one_s_own_gives_the_same_samples_to_any_number_of_workers(folder):
    folders.yolo(folder / "set", {"train": 5, "val": 1})
    augment = {"kind": "gamma_crop:GammaCrop", "options": {"size": 96}}
    settings = data(folder / "set", "yolo_reader:read", augment=augment)
    catalog = open_split(settings, "train")
    alone = list(batches(settings, catalog))
    assert {tuple(b.images.shape) for b in alone} == {(2, 3, 96, 96)}
    for rank in range(2):
        for whole, part in zip(alone, batches(settings, catalog, 2, rank), strict=True):
            assert (whole.images[rank] == part.images[0]).all()
            assert (whole.targets[rank].masks == part.targets[0].masks).all()
    colors = [b.images.unique().numel() for b in alone]
    assert min(colors) > 3  # gamma changes the three colours that the images have from sample to sample


OWN = """
from mpformer.data.augment import Placement
from mpformer.data.masks import Window
from mpformer.data.records import Polygons, Record, Segment
from mpformer.types import ClassInfo, ClassTable

class TooLarge:
    def canvas(self):
        return 32, 32
    def place(self, height, width, random):
        return Placement(Window.whole(width, height))

class Outside(TooLarge):
    def place(self, height, width, random):
        return Placement(Window(1, 0, width, height, 32, 32))

def read(root, split, task, label=0, image="a.png"):
    record = Record("a", image, 64, 64, (Segment(label, False, Polygons(()), 1.0, 1),))
    return ClassTable((ClassInfo("one", 1),)), (r for r in [record])

class Odd(TooLarge):
    def canvas(self):
        return 100, 64

class Wide(TooLarge):
    def canvas(self):
        return 64

class Nowhere(TooLarge):
    def place(self, height, width, random):
        return None

def encoded(root, split, task):
    return read(root, split, task, image=b"1")

def twice(root, split, task):
    classes, records = read(root, split, task)
    return classes, [*records] * 2

def between(root, split, task):
    return read(root, split, task, label=0.5)

def failing(root, split, task):
    return {}["nothing"]

def no_records(root, split, task):
    return ClassTable((ClassInfo("one", 1),)), None

def texts(root, split, task):
    return ClassTable((ClassInfo("one", 1),)), ["a.png"]

def records_only(root, split, task):
    return []

def empty(root, split, task):
    return ClassTable((ClassInfo("one", 1),)), []
"""


@pytest.mark.parametrize(
    ("reader", "options", "message"),
    [
        ("own:read", {"label": 1}, "data.dataset: own:read: image a: label 1 is none of 1 classes"),
        ("own:encoded", {}, "paths are expected in listed records"),
        ("own:between", {}, "own:between: image a: label 0.5 is none of 1 classes"),
        ("own:twice", {}, "own:twice: image a is there a second time"),
        ("own:failing", {}, "data.dataset: own:failing: KeyError: 'nothing'"),
        ("own:no_records", {}, "own:no_records: records are expected, not NoneType"),
        ("own:texts", {}, "own:texts: a Record is expected for each image, not 'a.png'"),
        ("own:read", {}, "image a: 'a.png': no such file in"),
        ("own:read", {"colour": 1}, "data.dataset.format: own:read: .*'colour'"),
        ("own:records_only", {}, r"own:records_only: a tuple .ClassTable, records. is expected, not list"),
        ("own:empty", {}, "own:empty: no image in the split 'train'"),
        ("own:reed", {}, "data.dataset.format: module 'own' has no 'reed'; nearest: own:read"),
    ],
)
def test_what_a_reader_does_wrong_is_one_error(folder, reader, options, message):
    (folder / "own.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        open_split(data(folder, reader, options=options), "train")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("own:TooLarge", r"data.augment: own:TooLarge: .* exceeds the canvas of 32x32 pixels"),
        ("own:Odd", r"data.augment: own:Odd: canvas .100, 64.: None or .*, multiples of 32, is expected"),
        ("own:Wide", "data.augment: own:Wide: canvas 64: None or"),
        ("own:Nowhere", "data.augment: own:Nowhere: a Placement is expected, not None"),
        ("own:Outside", r"data.augment: own:Outside: .* lies outside of the 64x64 image"),
    ],
)
def test_a_placement_that_fits_nowhere_is_one_error(folder, kind, message):
    (folder / "own.py").write_text(OWN)
    folders.yolo(folder / "set", {"train": 2, "val": 1})
    settings = data(folder / "set", "yolo_reader:read", augment={"kind": kind})
    with pytest.raises(InputError, match=message):
        next(batches(settings, open_split(settings, "train")))
