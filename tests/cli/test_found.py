"""Folders without settings on the command line: what is checked is what trains, and what is evaluated."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from mpformer.cli import checkpoints
from mpformer.cli.main import main
from mpformer.config import load_config
from mpformer.data.catalog import open_split
from mpformer.data.synthetic import generate
from mpformer.types import InputError
from tests.data.folders import coco_folder, photograph


def printed_command(told: str) -> list[str]:
    """The arguments of the command that `data check` proposes, as a shell reads them."""
    line = told.splitlines()[-1]
    assert line.startswith("train on it: mpformer train ")
    return shlex.split(line.removeprefix("train on it: "))[2:]


def image_ids(recipe: str, settings: list[str]) -> dict[str, set[str]]:
    data = load_config(recipe, settings).data
    return {split: {r.image_id for r in open_split(data, split).records} for split in ("train", "val")}


@pytest.fixture
def one_json(tmp_path: Path) -> Path:
    """A folder with one JSON of ten images and no split."""
    coco_folder(tmp_path / "mine", images=10)
    (tmp_path / "mine" / "train.json").rename(tmp_path / "mine" / "all.json")
    return tmp_path / "mine"


def test_one_json_is_divided_and_the_whole_command_is_printed(one_json: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(one_json.parent)
    assert main(["data", "check", "mine"]) == 0
    recipe, *settings = printed_command(capsys.readouterr().out)
    splits = image_ids(recipe, settings)
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 8, "val": 2}
    assert not splits["train"] & splits["val"]


def test_a_share_that_is_given_is_printed_once(one_json: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(one_json.parent)
    assert main(["data", "check", "mine", "data.dataset.train.share=[0,0.5]"]) == 0
    recipe, *settings = printed_command(capsys.readouterr().out)
    keys = [text.partition("=")[0] for text in settings]
    assert sorted(set(keys)) == sorted(keys)
    assert {split: len(ids) for split, ids in image_ids(recipe, settings).items()} == {"train": 5, "val": 5}


def test_images_and_masks_train_with_the_file_that_was_written(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "masks"):
        (tmp_path / "field" / folder).mkdir(parents=True)
    for number in range(5):
        cv2.imwrite(f"field/images/{number}.jpg", photograph(64, 64, seed=number))
        cv2.imwrite(f"field/masks/{number}.png", np.tri(64, dtype=np.uint8) * 255)
    assert main(["data", "check", "field"]) == 0
    told = capsys.readouterr().out
    recipe, *settings = printed_command(told)
    file = tmp_path / "runs" / "data-check" / "field" / "field.yaml"
    assert f"name the classes in {file.relative_to(tmp_path)}" in told
    file.write_text(file.read_text().replace("object", "weed"))
    assert main(["data", "check", "field"]) == 0
    assert "which was there" in capsys.readouterr().out
    data = load_config(recipe, settings).data
    assert [c.name for c in open_split(data, "train").classes.classes] == ["background", "weed"]
    assert {split: len(ids) for split, ids in image_ids(recipe, settings).items()} == {"train": 4, "val": 1}


def test_a_folder_of_the_same_name_has_a_file_of_its_own(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, value in (("a", 1), ("b", 7)):
        for folder in ("images", "masks"):
            (tmp_path / place / "field" / folder).mkdir(parents=True)
        for number in range(5):
            cv2.imwrite(f"{place}/field/images/{number}.jpg", photograph(64, 64, seed=number))
            cv2.imwrite(f"{place}/field/masks/{number}.png", np.tri(64, dtype=np.uint8) * value)
    ids = {}
    for place in ("a", "b"):
        assert main(["data", "check", f"{place}/field", "data.dataset.train.share=[0, 0.5]"]) == 0
        recipe, *settings = printed_command(capsys.readouterr().out)
        data = load_config(recipe, settings).data
        ids[place] = {c.id for c in data.dataset.classes}
        assert data.dataset.train.share == (0.0, 0.5)
        assert len(open_split(data, "train").records) < 5
    assert ids == {"a": {0, 1}, "b": {0, 7}}


def test_evaluation_finds_the_data_of_another_layout_as_data_check_does(tmp_path: Path, capsys) -> None:
    generate(tmp_path / "scenes", {"train": 2, "val": 2}, size=64)
    trained = load_config("coco-tiny", [f"data.root={tmp_path / 'scenes'}"])
    same = checkpoints._for_evaluation(trained, "run", str(tmp_path / "scenes"), [])
    assert same.data == trained.data
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "scenes" / "val2017", other / "valid")
    shutil.copytree(tmp_path / "scenes" / "train2017", other / "train")
    for split, folder in (("train", "train"), ("val", "valid")):
        source = tmp_path / "scenes" / "annotations" / f"instances_{split}2017.json"
        shutil.copy(source, other / folder / "_annotations.coco.json")
    found = checkpoints._for_evaluation(trained, "run", str(other), ["evaluate.limit=1"])
    assert found.data.dataset.val.annotations == "valid/_annotations.coco.json"
    assert (found.data.task, found.evaluate.limit, len(open_split(found.data, "val"))) == ("instance", 1, 2)
    given = ["data.dataset.val.annotations=x.json"]
    assert (
        checkpoints._for_evaluation(trained, "run", str(other), given).data.dataset.val.annotations
        == "x.json"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no COCO annotations in it"):
        checkpoints._for_evaluation(trained, "run", str(tmp_path / "empty"), [])


def test_a_panoptic_run_takes_the_panoptic_ones_of_two_forms(tmp_path: Path) -> None:
    generate(tmp_path / "scenes", {"train": 1, "val": 1}, size=64)
    trained = load_config("synthetic-panoptic-tiny", ["data.dataset.val.annotations=elsewhere.json"])
    found = checkpoints._for_evaluation(trained, "run", str(tmp_path / "scenes"), [])
    assert found.data.dataset.format == "coco_panoptic"
    assert json.loads((tmp_path / "scenes" / found.data.dataset.val.annotations).read_text())["images"]
