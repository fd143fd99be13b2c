"""Folders of images and masks without settings."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from mpformer.config import Data, LabelMaps
from mpformer.data.catalog import open_split
from mpformer.data.detect import detect
from mpformer.types import InputError
from tests.data.folders import photograph

SIZE = (40, 60)


def folder(
    root: Path, images: str, maps: str, values: list[list[int]], tail: str = "", ending: str = ".jpg"
) -> None:
    """Images and their maps, each of which has the values side by side."""
    for place in (images, maps):
        (root / place).mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(values):
        name = f"{maps.split('/')[0]}{number}" if "/" in maps else f"picture{number}"
        cv2.imwrite(str(root / images / f"{name}{ending}"), photograph(*SIZE, seed=number))
        columns = np.array_split(np.arange(SIZE[1]), len(own))
        label_map = np.zeros(SIZE, np.uint8)
        for value, where in zip(own, columns):
            label_map[:, where] = value
        cv2.imwrite(str(root / maps / f"{name}{tail}.png"), label_map)


def opened(root: Path, dataset: LabelMaps) -> dict[str, list[str]]:
    data = Data(root=str(root), dataset=dataset, task="semantic")
    return {
        split: [record.image_id for record in open_split(data, split).records] for split in ("train", "val")
    }


def test_images_and_masks_without_splits(tmp_path) -> None:
    folder(tmp_path, "images", "masks", [[0, 255]] * 10)
    found = detect(tmp_path)
    assert isinstance(found.dataset, LabelMaps)
    assert [(c.name, c.id) for c in found.dataset.classes] == [("background", 0), ("object", 255)]
    assert found.dataset.ignore == ()
    splits = opened(tmp_path, found.dataset)
    assert (len(splits["train"]), len(splits["val"])) == (8, 2)
    assert sorted(splits["train"] + splits["val"]) == sorted(f"picture{n}" for n in range(10))
    assert any("10 of 10 images" in note for note in found.notes)
    assert any("20% of the images" in note for note in found.notes)


@pytest.mark.parametrize(
    "layout",
    [
        ("train/images", "train/masks", "val/images", "val/masks"),
        ("images/train", "masks/train", "images/val", "masks/val"),
    ],
)
def test_folders_of_splits(tmp_path, layout) -> None:
    folder(tmp_path, *layout[:2], [[1, 2, 3]] * 3)
    folder(tmp_path, *layout[2:], [[1, 4, 255]] * 2)
    found = detect(tmp_path)
    assert isinstance(found.dataset, LabelMaps)
    assert [c.id for c in found.dataset.classes] == [1, 2, 3, 4]
    assert found.dataset.ignore == (255,)
    assert (found.dataset.train.images, found.dataset.train.labels) == layout[:2]
    assert (found.dataset.val.images, found.dataset.val.labels) == layout[2:]
    splits = opened(tmp_path, found.dataset)
    assert (len(splits["train"]), len(splits["val"])) == (3, 2)


def test_names_with_a_tail_and_other_endings(tmp_path) -> None:
    folder(tmp_path, "JPEGImages", "annotations", [[0, 1]] * 5, tail="_mask", ending=".png")
    found = detect(tmp_path).dataset
    assert isinstance(found, LabelMaps)
    assert (found.image_suffix, found.label_suffix) == (".png", "_mask.png")
    assert len(opened(tmp_path, found)["train"]) == 4


def test_numbers_of_objects_are_no_classes(tmp_path) -> None:
    folder(tmp_path, "images", "masks", [list(range(0, 5 + n)) for n in range(6)])
    with pytest.raises(
        InputError, match="10 values of 6 label maps in masks are probably numbers of objects"
    ):
        detect(tmp_path)


def test_masks_in_colours_are_refused_with_their_file(tmp_path) -> None:
    folder(tmp_path, "images", "masks", [[0, 1]] * 3)
    cv2.imwrite(str(tmp_path / "masks" / "picture0.png"), photograph(*SIZE))
    with pytest.raises(InputError, match=r"masks/picture0\.png"):
        detect(tmp_path)


def test_two_folders_of_masks_are_named(tmp_path) -> None:
    folder(tmp_path, "images", "masks", [[0, 1]] * 3)
    folder(tmp_path, "images", "labels", [[0, 1]] * 3)
    with pytest.raises(InputError, match=r"labels .*and masks .*may each hold the label maps"):
        detect(tmp_path)


def test_images_beside_masks_of_other_names_are_none(tmp_path) -> None:
    folder(tmp_path, "images", "other/masks", [[0, 1]] * 3)
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(InputError, match="no COCO annotations"):
        detect(tmp_path)


def test_a_whole_share_leaves_what_a_run_has_stored_as_it_was() -> None:
    split = {"images": "a", "labels": "b"}
    tree = {"format": "label_maps", "train": split, "val": split, "classes": [{"name": "x", "id": 0}]}
    assert LabelMaps.model_validate(tree).train.model_dump() == {**split, "instances": None, "names": None}
    part = LabelMaps.model_validate({**tree, "train": {**split, "share": [0, 0.5]}})
    assert part.model_dump()["train"]["share"] == (0.0, 0.5)
