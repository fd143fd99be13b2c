"""What identifies the data: the same wherever they lie, another as soon as an annotation changes."""

import json
import shutil

import cv2
import numpy as np
import pytest

from mpformer.config import Packed
from mpformer.data import pack, synthetic
from mpformer.data.catalog import open_split
from mpformer.data.version import data_version
from tests.data.folders import annotation, coco_folder
from tests.data.test_labelmaps import settings as label_settings


def version(data) -> str:
    return data_version(data, {name: open_split(data, name) for name in ("train", "val")})["data_version"]


def at(data, root):
    return data.model_copy(update={"root": str(root)})


def change_json(path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["annotations"].append(annotation(99, 1)),
        lambda tree: tree["annotations"][2].update(area=11.0),
        lambda tree: tree["annotations"][0]["segmentation"][0].__setitem__(0, 11.25),
        lambda tree: (tree["images"].pop(), tree["annotations"].pop()),
        lambda tree: tree["categories"][0].update(name="another name"),
    ],
)
def test_a_changed_annotation_is_another_version_and_a_moved_folder_is_not(tmp_path, change):
    data = coco_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert version(at(data, tmp_path / "there")) == version(data)
    change_json(tmp_path / "there" / "train.json", change)
    assert version(at(data, tmp_path / "there")) != version(data)


def test_a_lost_image_is_another_version_wherever_the_folder_lies(tmp_path):
    data = coco_folder(tmp_path / "here").model_copy(update={"on_bad_sample": "skip"})
    whole = version(data)
    (tmp_path / "here" / "images" / "2.png").unlink()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert version(data) == version(at(data, tmp_path / "there")) != whole


def test_a_packed_set_has_the_version_of_its_bytes(tmp_path):
    data = coco_folder(tmp_path / "folder")
    pack.pack(data, str(tmp_path / "one"))
    pack.pack(data, str(tmp_path / "two"))
    cv2.imwrite(str(tmp_path / "folder/images/1.png"), np.zeros((40, 60, 3), np.uint8))
    pack.pack(data, str(tmp_path / "other"))

    def packed(name):
        return version(data.model_copy(update={"root": str(tmp_path / name), "dataset": Packed()}))

    assert packed("one") == packed("two") != packed("other")


def test_a_label_map_of_another_size_is_another_version(tmp_path):
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "CamVid" / folder / "a.png"), np.zeros((40, 60, 3), np.uint8))
    data = label_settings(tmp_path, "camvid")
    before = version(data)
    assert version(data) == before
    cv2.imwrite(str(tmp_path / "CamVid/valannot/a.png"), np.eye(40, 60, dtype=np.uint8))
    assert version(data) != before


def test_a_generated_set_says_with_what_it_was_made(tmp_path):
    images = {"train": 2, "val": 1}
    data = label_settings(tmp_path / "a", "synthetic-instance", task="instance")
    synthetic.generate(tmp_path / "a", images, size=32)
    synthetic.generate(tmp_path / "b", images, size=32, seed=1)
    splits = {name: open_split(data, name) for name in images}
    tags = data_version(data, splits)
    assert tags["data"] == "synthetic-instance train: 2 images, synthetic-instance val: 1 images"
    assert json.loads(tags["data_generator"]) == {
        "version": 2,
        "images": images,
        "seed": 0,
        "size": 32,
        "things": 5,
    }
    assert version(at(data, tmp_path / "b")) != tags["data_version"]
    # a newer generator may draw other pixels for the same annotations
    change_json(tmp_path / "a" / "synthetic.json", lambda tree: tree["arguments"].update(version=3))
    assert data_version(data, splits)["data_version"] != tags["data_version"]
