"""Folders of label maps and of mask files: the real samples, and folders generated in the true layouts."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mpformer.config import Data, LargeScaleJitter, read_dataset
from mpformer.data import masks
from mpformer.data.catalog import open_split
from mpformer.data.findings import Weight
from mpformer.data.images import load_image
from mpformer.data.samples import make_sample
from mpformer.types import InputError
from tests.data.folders import photograph

FILES = Path(__file__).parents[2] / "experiments" / "data"


def settings(root, name, task="semantic", **changes):
    tree = {**read_dataset(FILES / f"{name}.yaml").tree, **changes}
    return Data(root=str(root), dataset=tree, task=task, augment=LargeScaleJitter(size=(64, 64)))


def semantic(record):
    """[h,w] labels, 255 where there is none."""
    labels = np.full((record.height, record.width), 255, np.uint8)
    for segment, mask in zip(record.segments, masks.record_masks(record)):
        labels[mask] = segment.label
    return labels


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_data_set_file_is_valid(path):
    data = Data(dataset=read_dataset(path).tree)
    classes = getattr(data.dataset, "classes", ())
    assert len({c.name for c in classes}) == len(classes)


def test_the_papers_class_counts():
    counts = {
        "cityscapes": (19, 8),
        "ade20k-semantic": (150, 100),
        "ade20k-panoptic": (150, 100),
        "mapillary-v1.2-panoptic": (65, 37),
        "mapillary-v2.0-semantic": (123, 0),
        "mapillary-v2.0-panoptic": (116, 70),
        "ade20k-full": (847, 0),
        "coco-stuff-10k": (171, 80),
        "camvid": (11, 0),
    }
    for name, (classes, things) in counts.items():
        listed = settings(".", name).dataset.classes
        assert (len(listed), sum(c.thing for c in listed)) == (classes, things), name


def test_camvid(sample_data):
    """Labels against the PNGs as PIL reads them, counts against SOURCES."""
    data = settings(sample_data / "camvid", "camvid")
    for split, count in (("train", 180), ("val", 45)):
        catalog = open_split(data, split)
        assert len(catalog) == count
        for record in catalog.records[::30]:
            path = sample_data / "camvid" / "CamVid" / f"{split}annot" / f"{record.image_id}.png"
            truth = np.array(Image.open(path))
            truth[truth == 11] = 255
            assert np.array_equal(semantic(record), truth)
            assert load_image(record).shape == (360, 480, 3)
            assert sum(s.area for s in record.segments) == (truth != 255).sum()


def test_cityscapes_labels_become_train_ids(sample_data):
    """The benchmark's own labelTrainIds, from its instanceIds and from its labelIds.

    The sample's maps were shrunk one by one, so a few pixels on borders differ between them.
    """
    root = sample_data / "cityscapes_instance_small"
    truth = np.array(Image.open(next(root.rglob("*_labelTrainIds.png"))))
    for name in ("cityscapes", "cityscapes-semantic"):
        (record,) = open_split(settings(root, name), "val").records
        found = semantic(record)
        assert (found == truth).mean() > 0.995
        for label in np.unique(truth):
            assert np.bincount(found[truth == label]).argmax() == label


def test_cityscapes_instances(sample_data):
    root = sample_data / "cityscapes_instance_small"
    ids = np.array(Image.open(next(root.rglob("*_instanceIds.png")))).astype(int)
    catalog = open_split(settings(root, "cityscapes", "instance"), "val")
    (record,) = catalog.records
    assert len(catalog.classes) == 8
    objects = {s.id: catalog.classes.classes[s.label] for s in record.segments if not s.crowd}
    assert len(objects) == 7
    assert {i: c.source_id for i, c in objects.items()} == {
        i: i // 1000 for i in np.unique(ids).tolist() if i >= 1000
    }
    for segment in record.segments:
        assert np.array_equal(masks.segment_mask(segment, record), ids == segment.id)
        assert segment.area == (ids == segment.id).sum()
    panoptic = open_split(settings(root, "cityscapes", "panoptic"), "val")
    (record,) = panoptic.records
    crowds = [s.id for s in record.segments if s.crowd]
    countable = {24, 25, 26, 27, 28, 31, 32, 33}
    assert crowds == [i for i in np.unique(ids).tolist() if i in countable]


def test_cityscapes_at_full_size(sample_data):
    catalog = open_split(settings(sample_data / "cityscapes_semantic", "cityscapes-semantic"), "val")
    assert len(catalog) == 3
    for record in catalog.records:
        path = sample_data / "cityscapes_semantic" / "gtFine" / "val"
        truth = np.array(Image.open(path / f"{record.image_id}_gtFine_labelIds.png"))
        for segment, mask in zip(record.segments, masks.record_masks(record)):
            source_id = catalog.classes.classes[segment.label].source_id
            assert np.array_equal(mask, truth == source_id)


@pytest.mark.parametrize(("version", "values"), [("v1.2", [17, 44, 45]), ("v2.0", [27, 84, 85])])
def test_mapillary_palettes_are_read_as_indices(sample_data, version, values):
    place = {"images": "images", "labels": version}
    name = f"mapillary-{version}-semantic"
    data = settings(sample_data / "mapillary_tiny", name, train=place, val=place)
    (record,) = open_split(data, "val").records
    assert [s.id for s in record.segments] == values
    names = open_split(data, "val").classes.names
    assert [names[s.label] for s in record.segments] == ["Building", "Street Light", "Pole"]
    truth = np.array(Image.open(next((sample_data / "mapillary_tiny" / version).iterdir())))
    assert np.array_equal(semantic(record), truth)


def test_ade20k_challenge(sample_data):
    root = sample_data / "ade20k_challenge" / "ADEChallengeData2016"
    catalog = open_split(settings(root, "ade20k-semantic", train=place_ade(), val=place_ade()), "val")
    assert len(catalog) == 2
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    assert list(catalog.classes.names) == [line.split("\t")[4].split(",")[0].strip() for line in lines]
    for record in catalog.records:
        truth = np.array(Image.open(root / "annotations" / "validation" / f"{record.image_id}.png"))
        # 0 is unlabelled and the classes are shifted by one: 0 - 1 wraps to 255
        assert np.array_equal(semantic(record), truth - np.uint8(1))


def place_ade():
    return {"images": "images/validation", "labels": "annotations/validation"}


def test_ade20k_full_classes_are_those_of_its_json(sample_data):
    """Class and object of each pixel from the _seg PNG against the list of objects beside it."""
    root = sample_data / "ade20k_full" / "ADE20K_2021_17_01"
    place = {"images": "images/ADE/training", "labels": "images/ADE/training"}
    listed, names = {}, {}
    for path in root.rglob("*.json"):
        objects = json.loads(path.read_text(errors="replace"))["annotation"]["object"]
        whole = [o for o in objects if o["parts"]["part_level"] == 0]
        listed[path.stem] = {o["name_ndx"] for o in whole}
        names |= {o["name_ndx"]: o["name"] for o in whole}
    tree = {
        "format": "label_maps",
        "train": place,
        "val": place,
        "label_suffix": "_seg.png",
        "encoding": "ade_full",
        "ignore": [0],
        "classes": [{"id": i, "name": n} for i, n in sorted(names.items())],
    }
    catalog = open_split(Data(root=str(root), dataset=tree, task="semantic"), "train")
    assert len(catalog) == 2
    for record in catalog.records:
        assert not record.problem
        found = {catalog.classes.classes[s.label].source_id for s in record.segments}
        assert found == listed[record.image_id.rpartition("/")[2]]


def test_ade20k_full_with_the_classes_of_maskformer(sample_data):
    """Everything on the two streets belongs to the 847 classes, under the names that their own JSONs give."""
    data = settings(sample_data / "ade20k_full" / "ADE20K_2021_17_01", "ade20k-full")
    catalog = open_split(data, "train")
    assert len(catalog) == 2
    for record in catalog.records:
        path = Path(data.root, "images", "ADE", "training", f"{record.image_id}.json")
        objects = json.loads(path.read_text(errors="replace"))["annotation"]["object"]
        names = {o["name_ndx"]: o["name"] for o in objects if o["parts"]["part_level"] == 0}
        found = {catalog.classes.classes[s.label] for s in record.segments}
        assert {c.source_id for c in found} == set(names)
        assert all(names[c.source_id].startswith(c.name) for c in found)


@pytest.mark.slow
def test_nuclei(sample_data):
    """85 images, 3036 nuclei (SOURCES); pixels against PIL; the shares part the images for good."""
    root = sample_data / "nuclei_dsb2018"
    data = settings(root, "nuclei", "instance")
    parts = [open_split(data, split).records for split in ("train", "val")]
    records = [r for part in parts for r in part]
    assert len({r.image_id for r in records}) == len(records) == 85
    assert 10 <= len(parts[1]) <= 25
    assert sum(len(r.segments) for r in records) == 3036
    assert max(len(r.segments) for r in records) == 375
    for record in records[::12]:
        folder = root / Path(record.image_id).parent.parent / "masks"
        truth = [np.array(Image.open(p)) == 255 for p in sorted(folder.iterdir())]
        assert np.array_equal(masks.record_masks(record), np.stack(truth))
        assert load_image(record).shape == (record.height, record.width, 3)
        assert [s.area for s in record.segments] == [t.sum() for t in truth]


# --- generated in the true layout -----------------------------------------------------------------


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]
    cv2.imwrite(str(path), pixels)


def test_coco_stuff_10k(tmp_path):
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 90, 92, 182], (40, 60)).astype(np.uint8)
    for name in ("a", "b"):
        write(tmp_path / "images" / f"{name}.jpg", photograph())
        (tmp_path / "annotations").mkdir(exist_ok=True)
        savemat(tmp_path / "annotations" / f"{name}.mat", {"S": labels, "captions": "x"}, do_compression=True)
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "imageLists" / "train.txt").write_text("b\n")
    (tmp_path / "imageLists" / "test.txt").write_text("a\n")
    data = settings(tmp_path, "coco-stuff-10k")
    (record,) = open_split(data, "train").records
    assert record.image_id == "b"
    classes = open_split(data, "train").classes.classes
    for segment, mask in zip(record.segments, masks.record_masks(record)):
        assert np.array_equal(mask, labels == classes[segment.label].source_id)
    assert [classes[s.label].name for s in record.segments] == ["person", "toothbrush", "banner", "wood"]
    (tmp_path / "imageLists" / "train.txt").write_text("b\nc\n")
    with pytest.raises(InputError, match=r"train\.txt:2: there is no image 'c\.jpg'; nearest: "):
        open_split(data, "train")
    (tmp_path / "annotations" / "a.mat").write_bytes(b"broken")
    assert "not a MATLAB file" in open_split(data, "val").records[0].problem


def test_ade20k_panoptic(tmp_path):
    """Stuff from the label map, things from the instance map, which lies on top."""
    labels = np.full((40, 60), 1, np.uint8)  # wall
    labels[20:] = 4  # floor
    labels[5:15, 5:25] = 8  # bed, the first countable class
    labels[30:35, 40:50] = 16  # table, in no instance
    labels[:2] = 0
    instances = np.zeros((40, 60, 3), np.uint8)
    instances[5:15, 5:15, :2] = (1, 1)
    instances[5:15, 15:28, :2] = (1, 2)  # reaches over the wall
    write(tmp_path / "images" / "validation" / "a.jpg", photograph())
    write(tmp_path / "annotations" / "validation" / "a.png", labels)
    write(tmp_path / "annotations_instance" / "validation" / "a.png", instances)
    catalog = open_split(settings(tmp_path, "ade20k-panoptic", "panoptic"), "val")
    (record,) = catalog.records
    names = catalog.classes.names
    found = {
        (names[s.label], s.crowd, m.tobytes()) for s, m in zip(record.segments, masks.record_masks(record))
    }
    first, second = instances[..., 1] == 1, instances[..., 1] == 2
    wall, floor = (labels == 1) & ~second, labels == 4
    expected = {"bed": (first, second), "wall": (wall,), "floor": (floor,)}
    assert found == {(n, False, m.tobytes()) for n, several in expected.items() for m in several}
    things = open_split(settings(tmp_path, "ade20k-panoptic", "instance"), "val")
    assert len(things.classes) == 100
    assert [things.classes.names[s.label] for s in things.records[0].segments] == ["bed", "bed"]
    instances[5:15, 15:28, 0] = 101
    write(tmp_path / "annotations_instance" / "validation" / "a.png", instances)
    assert "a.png: no class has as its `instance_id` the number 101 in the" in catalog.records[0].problem
    write(tmp_path / "annotations_instance" / "validation" / "a.png", instances[:39])
    assert "another size" in catalog.records[0].problem


@pytest.mark.parametrize(
    ("version", "folder", "sky", "road", "car", "void"),
    [("v1.2", "instances", 27, 13, 55, 65), ("v2.0", "v2.0/instances", 61, 21, 108, 115)],
)
def test_mapillary_panoptic(tmp_path, version, folder, sky, road, car, void):
    ids = np.full((40, 60), sky * 256, np.uint16)
    ids[20:] = road * 256
    ids[22:30, 5:20] = car * 256 + 1
    ids[22:30, 30:50] = car * 256 + 2
    ids[:3] = void * 256
    write(tmp_path / "validation" / "images" / "a.jpg", photograph())
    write(tmp_path / "validation" / folder / "a.png", ids)
    catalog = open_split(settings(tmp_path, f"mapillary-{version}-panoptic", "panoptic"), "val")
    (record,) = catalog.records
    found = {s.id: catalog.classes.names[s.label] for s in record.segments}
    assert found == {road * 256: "Road", sky * 256: "Sky", car * 256 + 1: "Car", car * 256 + 2: "Car"}
    for segment, mask in zip(record.segments, masks.record_masks(record)):
        assert np.array_equal(mask, ids == segment.id)


# --- what may be wrong ----------------------------------------------------------------------------


def small(root, **changes):
    for name in ("a", "b", "deep/c"):
        write(root / "images" / f"{name}.png", photograph())
        write(root / "labels" / f"{name}.png", np.tile(np.array([0, 1, 255], np.uint8), (40, 20)))
    place = {"images": "images", "labels": "labels"}
    tree = {
        "format": "label_maps",
        "name": "small",
        "train": place,
        "val": place,
        "image_suffix": ".png",
        "classes": [{"id": 0, "name": "x"}, {"id": 1, "name": "y"}],
        "ignore": [255],
        **changes,
    }
    return Data(root=str(root), dataset=tree, task="semantic", augment=LargeScaleJitter(size=(64, 64)))


def test_folders_inside_and_records_that_travel(tmp_path):
    catalog = open_split(small(tmp_path), "train")
    assert [r.image_id for r in catalog.records] == ["a", "b", "deep/c"]
    copy = pickle.loads(pickle.dumps(catalog))  # noqa: S301  (what Ray and torch do with it)
    data = small(tmp_path)
    for position in range(3):
        first, second = (make_sample(c, data, 0, position) for c in (catalog, copy))
        assert first.bits == second.bits
        assert sorted(first.labels.tolist()) == sorted(set(first.labels.tolist()))


def test_an_image_without_a_label_map(tmp_path):
    data = small(tmp_path)
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(InputError, match=r"images/b\.png: its label map: 'b\.png': no such file in .*labels"):
        open_split(data, "train")
    records = open_split(data.model_copy(update={"on_bad_sample": "skip"}), "train").records
    assert [bool(r.problem) for r in records] == [False, True, False]


def test_the_label_map_of_another_image_is_not_proposed(tmp_path):
    data = small(tmp_path).model_copy(update={"on_bad_sample": "skip"})
    (tmp_path / "labels" / "b.png").unlink()
    for name, proposed in (("b_.png", "b_.png"), ("zzzzzzzz.png", None)):
        write(tmp_path / "labels" / name, np.zeros((40, 60), np.uint8))
        found = {f.kind: f for f in open_split(data, "train").findings}
        text = found["images without a label map"].text
        assert text.partition("; nearest: ")[2] == (proposed or "")
        assert text.startswith(f"{tmp_path}/images/b.png: its label map: 'b.png': no such file in")
        (tmp_path / "labels" / name).unlink()


def test_label_maps_without_an_image_are_counted(tmp_path):
    """Not those of the other split in the same folder, nor those that a file of names leaves out."""
    for name in ("train/a", "train/b", "val/c"):
        write(tmp_path / "images" / f"{name}.png", photograph())
    for name in ("a", "b", "c", "stray", "stray2"):
        write(tmp_path / "labels" / f"{name}.png", np.zeros((40, 60), np.uint8))
    (tmp_path / "labels" / "readme.txt").write_text("not a map")
    places = {s: {"images": f"images/{s}", "labels": "labels"} for s in ("train", "val")}

    def found():
        data = small(tmp_path / "other", **places).model_copy(update={"root": str(tmp_path)})
        return {s: open_split(data, s).findings for s in ("train", "val")}

    for split, (finding,) in found().items():
        assert (finding.kind, finding.count) == ("label maps without an image", 2)
        assert finding.weight is Weight.NOTE
        expected = f"{tmp_path}/labels/stray.png: no image in {tmp_path}/images/{split} has this label map"
        assert finding.text == expected
    (tmp_path / "list.txt").write_text("a\n")
    places["train"]["names"] = "list.txt"
    assert found()["train"] == ()
    for name in ("stray", "stray2"):
        (tmp_path / "labels" / f"{name}.png").unlink()
    assert found()["val"] == ()


def test_values_and_shapes_that_are_wrong_are_named(tmp_path):
    data = small(tmp_path)
    catalog = open_split(data, "train")
    write(tmp_path / "labels" / "a.png", np.full((40, 60), 7, np.uint8))
    assert "labels/a.png: the value 7 is neither a class nor" in catalog.records[0].problem
    others = open_split(small_ignoring_others(data), "train")
    assert others.records[0].segments == ()
    write(tmp_path / "labels" / "a.png", photograph())
    assert "labels/a.png: one value per pixel is expected, not 3 channels" in catalog.records[0].problem
    write(tmp_path / "labels" / "a.png", np.full((40, 60, 3), 1, np.uint8))
    assert [(s.id, s.area) for s in catalog.records[0].segments] == [(1, 2400)]
    write(tmp_path / "labels" / "b.png", np.zeros((20, 60), np.uint8))
    with pytest.raises(InputError, match="the image is 60x40, but its annotations say 60x20"):
        load_image(catalog.records[1])


def small_ignoring_others(data):
    return data.model_copy(update={"dataset": data.dataset.model_copy(update={"ignore": "others"})})


def test_tasks_that_the_maps_cannot_serve(tmp_path):
    data = small(tmp_path).model_copy(update={"task": "panoptic"})
    with pytest.raises(InputError, match=r"data\.task: 'panoptic' needs separate objects"):
        open_split(data, "train")


def test_missing_folders_and_files(tmp_path):
    data = small(tmp_path)
    for place, expected in (
        ({"images": "pictures", "labels": "labels"}, "there is no folder .*pictures"),
        ({"images": "images", "labels": "maps"}, "there is no folder .*maps"),
        ({"images": "images", "labels": "labels", "names": "list.txt"}, r"list\.txt: cannot be read"),
    ):
        changed = small(tmp_path, train=place)
        with pytest.raises(InputError, match=expected):
            open_split(changed, "train")
    with pytest.raises(InputError, match=r"images: no file that ends in '\.tif'"):
        open_split(small(tmp_path, image_suffix=".tif"), "train")
    assert len(open_split(data, "train")) == 3


def test_mask_files_that_are_wrong(tmp_path):
    write(tmp_path / "stage1_train" / "a" / "images" / "a.png", photograph())
    write(tmp_path / "stage1_train" / "a" / "masks" / "1.png", np.full((40, 61), 255, np.uint8))
    place = {"images": "stage1_train/*/images/*.png", "masks": "../masks/*.png"}
    data = settings(tmp_path, "nuclei", "instance", train=place, val={**place, "share": [0.0, 0.0]})
    problem = open_split(data, "train").records[0].problem
    assert "masks/1.png: the mask is 61x40, but its image is 60x40" in problem
    with pytest.raises(InputError, match="none of 1 images lies in the share"):
        open_split(data, "val")
    with pytest.raises(InputError, match="no image fits the pattern"):
        open_split(data.model_copy(update={"root": str(tmp_path / "stage1_train")}), "train")
    (tmp_path / "stage1_train" / "a" / "images" / "a.png").write_bytes(b"broken")
    assert "a.png: not an image" in open_split(data, "train").records[0].problem
