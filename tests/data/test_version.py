"""What identifies the data: the same wherever they lie, another as soon as an annotation changes."""

import json
import shutil
from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from mpformer.config import Data, Packed, PluginDataSet
from mpformer.data import pack, synthetic
from mpformer.data.records import Catalog, Record, Records
from mpformer.data.version import SPLITS, DataVersion, changes
from mpformer.types import ClassTable, InputError
from tests.data.folders import annotation, coco_folder
from tests.data.test_labelmaps import settings as label_settings


def described(data):
    """As `data.json` keeps it."""
    version = DataVersion(data)
    return json.loads(json.dumps({split: version.describe(split) for split in SPLITS}))


def tags(data) -> dict[str, str]:
    version = DataVersion(data)
    return version.tags({split: version.describe(split) for split in SPLITS})


def version(data) -> str:
    return tags(data)["data_version"]


def changed(data, before) -> dict[str, str]:
    """By split, what is said to have changed."""
    now = DataVersion(data)
    found = {split: changes(split, before[split], now.compared(split, before[split])) for split in SPLITS}
    return {split: text for split, text in found.items() if text}


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


def camvid(tmp_path, names=("a", "b")):
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
            for name in names:
                path = str(tmp_path / "CamVid" / folder / f"{name}.png")
                cv2.imwrite(path, np.zeros((40, 60, 3), np.uint8))
    return label_settings(tmp_path, "camvid")


def test_a_label_map_of_other_pixels_is_another_version_also_at_the_same_size(tmp_path):
    data = camvid(tmp_path)
    first, before = version(data), described(data)
    assert (version(data), changed(data, before)) == (first, {})
    path = tmp_path / "CamVid/valannot/a.png"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert path.stat().st_size == size
    assert version(data) != first
    assert changed(data, before) == {"val": "val: 1 label file changed ('CamVid/valannot/a.png')"}


def test_images_of_label_maps_that_come_and_go_are_named(tmp_path):
    data = camvid(tmp_path)
    before = described(data)
    for folder in ("train", "trainannot"):
        (tmp_path / "CamVid" / folder / "b.png").rename(tmp_path / "CamVid" / folder / "c.png")
    assert changed(data, before) == {
        "train": "train: 1 image added ('c'), 1 image removed ('b'), "
        "1 label file added ('CamVid/trainannot/c.png'), 1 label file removed ('CamVid/trainannot/b.png')"
    }


def test_mask_files_are_known_by_their_content(tmp_path):
    data = label_settings(tmp_path, "nuclei", task="instance")
    for number in range(12):
        for folder in ("images", "masks"):
            (tmp_path / f"stage1_train/{number}" / folder).mkdir(parents=True)
            pixels = np.full((40, 60), 255, np.uint8)
            cv2.imwrite(str(tmp_path / f"stage1_train/{number}/{folder}/{number}.png"), pixels)
    before = described(data)
    assert changed(data, before) == {}
    names = before["train"]["images"]
    number = names[0].split("/")[1]
    cv2.imwrite(str(tmp_path / f"stage1_train/{number}/masks/new.png"), np.full((40, 60), 255, np.uint8))
    text = f"train: 1 label file added ('stage1_train/{number}/masks/new.png')"
    assert changed(data, before) == {"train": text}


def test_panoptic_masks_are_known_by_their_content(tmp_path):
    synthetic.generate(tmp_path, {"train": 2, "val": 1}, size=32)
    data = label_settings(tmp_path, "synthetic-panoptic", task="panoptic")
    before = described(data)
    assert changed(data, before) == {}
    mask = next((tmp_path / "annotations/panoptic_train2017").glob("*.png"))
    mask.write_bytes(mask.read_bytes() + b"x")
    name = str(mask.relative_to(tmp_path))
    assert changed(data, before) == {"train": f"train: 1 label file changed ('{name}')"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tree: tree["categories"].append({"id": 9, "name": "tree"}), "1 class added ('tree')"),
        (
            lambda tree: tree["categories"][0].update(name="lion"),
            "1 class added ('lion'), 1 class removed ('cat')",
        ),
        (
            lambda tree: tree["categories"][1].update(id=8),
            "the classes have other ids, kinds or another order",
        ),
        (
            lambda tree: (tree["images"].pop(), tree["annotations"].pop()),
            "1 image removed ('images/4.png'), 3 annotations instead of 4",
        ),
        (lambda tree: tree["annotations"].append(annotation(99, 1)), "5 annotations instead of 4"),
        (lambda tree: tree["annotations"][0].update(category_id=7), "other annotations (4, as before)"),
        (lambda tree: tree["annotations"][0].update(iscrowd=1), "other annotations (4, as before)"),
    ],
)
def test_a_change_of_coco_annotations_is_said_in_words(tmp_path, change, text):
    data = coco_folder(tmp_path)
    shutil.copy(tmp_path / "train.json", tmp_path / "val.json")
    dataset = data.dataset
    val = dataset.val.model_copy(update={"annotations": "val.json"})
    data = data.model_copy(update={"dataset": dataset.model_copy(update={"val": val})})
    before = described(data)
    change_json(tmp_path / "train.json", change)
    assert changed(data, before) == {"train": f"train.json: {text}"}


def test_a_file_that_is_written_anew_with_the_same_content_has_not_changed(tmp_path):
    data = coco_folder(tmp_path)
    before = described(data)
    (tmp_path / "train.json").write_text(
        json.dumps(json.loads((tmp_path / "train.json").read_text()), indent=4)
    )
    assert changed(data, before) == {}


def test_annotations_that_have_not_changed_are_not_parsed_again(tmp_path, monkeypatch):
    data = coco_folder(tmp_path)
    before = described(data)
    monkeypatch.setattr("mpformer.data.version.open_split", lambda *_: pytest.fail("the split was opened"))
    assert changed(data, before) == {}


def test_images_that_are_gone_and_back_are_named(tmp_path):
    data = coco_folder(tmp_path).model_copy(update={"on_bad_sample": "skip"})
    before = described(data)
    (tmp_path / "images/2.png").rename(tmp_path / "2.png")
    without = described(data)
    assert changed(data, before)["train"] == "train: 1 image file is gone ('images/2.png')"
    assert changed(data, without) == {}
    (tmp_path / "2.png").rename(tmp_path / "images/2.png")
    assert changed(data, without)["train"] == "train: 1 image added ('images/2.png')"


def test_litter_beside_the_images_changes_nothing(tmp_path):
    data = coco_folder(tmp_path)
    before = described(data)
    (tmp_path / "images/.DS_Store").write_bytes(b"x")
    (tmp_path / "images/9.png").write_bytes(b"not annotated")
    assert changed(data, before) == {}


def test_changed_annotations_that_cannot_be_read_have_changed_and_missing_ones_are_missing(tmp_path):
    data = coco_folder(tmp_path)
    before = described(data)
    (tmp_path / "train.json").write_text("{")
    assert "train.json: changed, and cannot be read: " in changed(data, before)["train"]
    (tmp_path / "train.json").unlink()
    with pytest.raises(InputError, match=r"no file .*train\.json"):
        changed(data, before)


def test_many_names_are_counted(tmp_path):
    data = coco_folder(tmp_path, images=4).model_copy(update={"on_bad_sample": "skip"})
    before = described(data)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    text = "4 image files are gone ('images/1.png', 'images/2.png', 'images/3.png' and 1 more)"
    assert changed(data, before)["train"] == f"train: {text}"


def test_shards_are_known_by_their_checksums(tmp_path):
    data = coco_folder(tmp_path / "folder")
    pack.pack(data, str(tmp_path / "packed"))
    packed = data.model_copy(update={"root": str(tmp_path / "packed"), "dataset": Packed()})
    before = described(packed)
    assert changed(packed, before) == {}
    shutil.rmtree(tmp_path / "packed")
    pack.pack(coco_folder(tmp_path / "folder", images=5), str(tmp_path / "packed"))
    [shard] = before["train"]["labels"]
    text = f"train: 1 shard changed ('{shard}'), 5 images instead of 4"
    assert changed(packed, before)["train"] == text


@dataclass(frozen=True)
class Listed(Records):
    """What a plug-in may return: records of its own, of which only the fingerprint is known."""

    digits: str

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> Record:
        return Record(str(index), "a.png", 8, 8, ())

    def fingerprint(self) -> str:
        return self.digits


def test_records_of_a_plug_in_are_known_by_their_fingerprint(monkeypatch, tmp_path):
    classes = ClassTable.numbered(2)
    digits = ["a"]

    def opened(data, split):
        return Catalog(split, classes, Listed(digits[0]), str(tmp_path))

    monkeypatch.setattr("mpformer.data.version.open_split", opened)
    reader = PluginDataSet(format="somewhere:Reader")
    data = Data(root=str(tmp_path), dataset=reader)
    before = described(data)
    assert changed(data, before) == {}
    digits[0] = "b"
    assert changed(data, before)["val"] == "val: other annotations"


def test_a_generated_set_says_with_what_it_was_made(tmp_path):
    images = {"train": 2, "val": 1}
    data = label_settings(tmp_path / "a", "synthetic-instance", task="instance")
    synthetic.generate(tmp_path / "a", images, size=32)
    synthetic.generate(tmp_path / "b", images, size=32, seed=1)
    found = tags(data)
    assert found["data"] == "synthetic-instance train: 2 images, synthetic-instance val: 1 images"
    assert json.loads(found["data_generator"]) == {
        "version": 2,
        "images": images,
        "seed": 0,
        "size": 32,
        "things": 5,
    }
    assert version(at(data, tmp_path / "b")) != found["data_version"]
    # a newer generator may draw other pixels for the same annotations
    change_json(tmp_path / "a" / "synthetic.json", lambda tree: tree["arguments"].update(version=3))
    assert version(data) != found["data_version"]
