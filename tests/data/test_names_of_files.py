"""File and class names that are not UTF-8, or not even text: from the folder to shards, samples and pages."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest

from mpformer.config import Data
from mpformer.data import pack, packed
from mpformer.data.catalog import open_split
from mpformer.data.check import check, report_text
from mpformer.data.images import load_image
from mpformer.data.packing import from_table, to_table
from mpformer.data.records import Record, build_table
from mpformer.data.samples import make_sample
from mpformer.types import InputError
from tests.data.folders import coco_folder, photograph

ODD = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def fresh():
    """Groups in memory belong to the files of another test."""
    packed._read_group.cache_clear()
    packed._open_shard.cache_clear()


def mask_files(root) -> Data:
    for folder, pixels in (("images", photograph()), ("masks", np.full((40, 60), 255, np.uint8))):
        (root / ODD / folder).mkdir(parents=True)
        (root / ODD / folder / f"{ODD}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    place = {"images": "*/images/*.png", "masks": "../masks/*.png"}
    classes = [{"id": 1, "name": ODD, "thing": True}]
    tree = {"format": "mask_files", "train": place, "val": place, "classes": classes}
    return Data(root=str(root), dataset=tree, loader="inline", augment={"size": [64, 64]})


def test_a_table_of_records_keeps_such_paths():
    record = Record("1", f"images/{ODD}.png", 60, 40, (), problem="")
    assert build_table([record], "/data")[0].image == f"/data/images/{ODD}.png"
    for name in (ODD, "\ud800"):
        written = Record(name, "", 1, 1, (), problem=f"{name}: bad")
        (written.image_id + written.problem).encode()
    assert Record(ODD, "", 1, 1, ()).image_id == r"caf\xe9"


def test_mask_files_of_such_names(tmp_path):
    data = mask_files(tmp_path)
    catalog = open_split(data, "train")
    assert load_image(catalog.records[0]).shape == (40, 60, 3)
    assert len(catalog.records.fingerprint()) == 64
    text = report_text(check(data))
    assert r"caf\xe9 1 in 1" in text
    text.encode()
    sample = make_sample(catalog, data, 0, 0)
    [back] = from_table(to_table([sample]))
    assert back.image_id == sample.image_id
    error = InputError(f"{tmp_path / ODD}: bad")
    assert to_table([(0, error)]).column("error").to_pylist() == [rf"{tmp_path}/caf\xe9: bad"]


def test_shards_in_and_of_such_folders(tmp_path):
    data, out = mask_files(tmp_path / "in"), tmp_path / ODD / "packed"
    pack.pack(data, str(out))
    shards = Data(root=str(out), dataset={"format": "packed"})
    assert packed.is_packed(str(out))
    assert packed.verify(str(out), "train") == []
    ours, theirs = (open_split(d, "train").records[0] for d in (shards, data))
    assert ours.image_id == theirs.image_id
    assert np.array_equal(load_image(ours), load_image(theirs))


def test_lone_surrogates_in_coco_json(tmp_path):
    """JSON has escapes for what is no character."""
    data = coco_folder(tmp_path, images=1)
    tree = json.loads((tmp_path / "train.json").read_text())
    tree["categories"][0]["name"] = "\ud800\n|"
    tree["images"][0]["file_name"] = "\udc80.png"
    (tmp_path / "train.json").write_text(json.dumps(tree))
    shutil.move(tmp_path / "images" / "1.png", tmp_path / "images" / "\udc80.png")
    assert open_split(data, "train").classes.names[0] == r"\ud800\n|"
    text = report_text(check(data))
    assert "no problems found" in text
    text.encode()


def test_a_home_that_is_a_folder_of_that_name(tmp_path, monkeypatch):
    """`~name` stands for a user's home only where there is such a user."""
    monkeypatch.chdir(tmp_path)
    coco_folder(tmp_path / "~nobody-of-that-name", images=1)
    data = coco_folder(tmp_path / "~nobody-of-that-name", images=1)
    assert len(open_split(data.model_copy(update={"root": "~nobody-of-that-name"}), "train")) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.pop("shards"),
        lambda m: m.update(shards=[{}]),
        lambda m: m.update(classes=3),
        lambda m: m.update(classes=[]),
        lambda m: m.update(group=0),
        lambda m: m.update(bits=40),
        lambda m: m["shards"][0].update(rows="many"),
    ],
)
def test_a_manifest_of_another_form_is_named(tmp_path, damage):
    pack.pack(coco_folder(tmp_path, images=1), str(tmp_path / "out"))
    path = tmp_path / "out" / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    for content in (json.dumps(manifest), "{", "[]", "\xff"):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=r"train/manifest\.json: not "):
            packed.open_packed(str(tmp_path / "out"), "train", "instance")
