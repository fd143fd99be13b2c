"""The generated data set: its three annotation forms agree, and the same command does nothing new."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mpformer.config import Data, build_config, read_dataset, read_recipe
from mpformer.data import masks, synthetic
from mpformer.data.catalog import open_split
from mpformer.data.images import load_image
from mpformer.types import InputError

COUNTS = {"train": 24, "val": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    assert synthetic.generate(out, COUNTS, seed=3, size=96)
    return out


def checksum(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def opened(folder, form, task, split="train"):
    dataset = read_dataset(synthetic_file(form)).tree
    return open_split(Data(root=str(folder), dataset=dataset, task=task), split)


def synthetic_file(form):
    return Path(__file__).parents[2] / "experiments" / "data" / f"synthetic-{form}.yaml"


def test_the_forms_agree(folder):
    """Panoptic segments fill the image once; things are the instance file's; labels are the PNG's."""
    for split, count in COUNTS.items():
        panoptic = opened(folder, "panoptic", "panoptic", split)
        instance = opened(folder, "instance", "instance", split)
        assert len(panoptic) == len(instance) == count
        names = panoptic.classes.names
        assert [names[i] for i in sorted(panoptic.classes.thing_labels)] == list(instance.classes.names)
        for record, other in zip(panoptic.records, instance.records):
            assert load_image(record).shape == (96, 96, 3)
            stacked = masks.record_masks(record)
            assert (stacked.sum(0) == 1).all()
            assert [m.sum() for m in stacked] == [s.area for s in record.segments]
            labels = np.array([s.label for s in record.segments])[stacked.argmax(0)]
            stem = f"{int(record.image_id):012d}.png"
            semantic = cv2.imread(str(folder / f"semantic_{split}2017" / stem), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(semantic, labels)
            things = sorted(
                (names[s.label], s.crowd, m.tobytes())
                for s, m in zip(record.segments, stacked)
                if s.label in panoptic.classes.thing_labels
            )
            found = sorted(
                (instance.classes.names[s.label], s.crowd, m.tobytes())
                for s, m in zip(other.segments, masks.record_masks(other))
            )
            assert found == things


def test_what_the_quickstart_needs_is_there(folder):
    coco = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    kinds = {type(a["segmentation"]).__name__ for a in coco["annotations"]}
    assert kinds == {"list", "dict"}
    per_image = np.bincount([a["image_id"] for a in coco["annotations"]])[1:]
    assert per_image.min() >= 2
    assert per_image.max() <= 6
    flat = [
        np.array(a["segmentation"][0]) for a in coco["annotations"] if isinstance(a["segmentation"], list)
    ]
    assert min(f.min() for f in flat) >= 0
    assert max(f.max() for f in flat) <= 96
    areas = np.array([a["area"] for a in coco["annotations"]])
    assert areas.max() > 20 * areas.min()
    assert len({a["category_id"] for a in coco["annotations"]}) == len(coco["categories"]) == 4


def test_pycocotools_reads_the_instances(folder, capsys):
    coco = COCO(str(folder / "annotations" / "instances_val2017.json"))
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        assert list(cv2.boundingRect(mask)) == annotation["bbox"]


def test_the_same_arguments_give_the_same_bytes_and_the_seed_others(folder, tmp_path):
    first = checksum(folder)
    assert synthetic.generate(folder, COUNTS, seed=3, size=96) is False
    assert checksum(folder) == first
    synthetic.generate(tmp_path / "again", COUNTS, seed=3, size=96)
    assert checksum(tmp_path / "again") == first
    synthetic.generate(tmp_path / "other", COUNTS, seed=4, size=96)
    assert checksum(tmp_path / "other").keys() == first.keys()
    same = [name for name, digest in checksum(tmp_path / "other").items() if first[name] == digest]
    assert same == []


def test_more_images_keep_the_first_ones(folder, tmp_path):
    synthetic.generate(tmp_path, {"train": 4}, seed=3, size=96)
    for path in (tmp_path / "train2017").iterdir():
        assert path.read_bytes() == (folder / "train2017" / path.name).read_bytes()


def test_an_interrupted_folder_is_finished_and_a_foreign_one_left_alone(folder, tmp_path):
    marker = tmp_path / "half" / "synthetic.json"
    marker.parent.mkdir()
    state = json.loads((folder / "synthetic.json").read_text())
    marker.write_text(json.dumps({**state, "complete": False}))
    assert synthetic.generate(tmp_path / "half", COUNTS, seed=3, size=96)
    assert checksum(tmp_path / "half") == checksum(folder)
    with pytest.raises(InputError, match="other arguments"):
        synthetic.generate(folder, COUNTS, seed=4, size=96)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        synthetic.generate(tmp_path / "mine")
    with pytest.raises(InputError, match="size of at least 32"):
        synthetic.generate(tmp_path / "tiny", size=8)


def test_the_data_set_files_are_read_by_recipes(tmp_path, folder):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{root: {folder}, task: panoptic, dataset: {synthetic_file('panoptic')}}}\n")
    config = build_config(read_recipe(recipe))
    assert len(open_split(config.data, "val").classes) == 7
