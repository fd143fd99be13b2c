"""Shipped recipes, studies and data-set files are found by their bare names, from any folder."""

from collections import Counter
from pathlib import Path

import pytest

from mpformer.ablation.spec import load_study
from mpformer.config import load_config
from mpformer.config.shipped import DATA_SETS, RECIPES, experiments, locate
from mpformer.types import InputError

OWN = """
train: {lr: 3e-4}
"""
STUDY = """
title: Two sizes
base: coco-panoptic-r50
columns: {val/PQ: {title: PQ}}
baseline: small
rows:
  small: {settings: {model.decoder.queries: 50}}
  large: {settings: {model.decoder.queries: 100}}
profiles_from: profiles
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["coco-tiny", "coco-tiny.yaml", "mapillary-semantic-r50"])
def test_a_recipe_by_name(name):
    stem = name.removesuffix(".yaml")
    path = experiments() / "recipes" / f"{stem}.yaml"
    assert load_config(name) == load_config(path)
    assert load_config(name).name == stem


@pytest.mark.parametrize("name", ["mpformer-table8", "quickstart", "quickstart.yaml"])
def test_a_study_by_name(name):
    study = load_study(name)
    assert study.path.is_relative_to(experiments())
    assert study.path.name == f"{name.removesuffix('.yaml')}.yaml"


def test_a_path_that_exists_wins(folder):
    (folder / "coco-tiny").write_text(OWN)
    (folder / "sub").mkdir()
    (folder / "sub" / "coco-tiny.yaml").write_text(OWN)
    for own in ("coco-tiny", "sub/coco-tiny.yaml"):
        assert load_config(own).train.lr == 3e-4


def test_a_folder_of_the_same_name_is_no_recipe(folder):
    (folder / "nuclei").mkdir()
    assert load_config("nuclei").name == "nuclei"


def test_a_file_of_ones_own_is_laid_over_a_shipped_one(folder):
    (folder / "own.yaml").write_text(f"base: coco-instance-r50{OWN}data: {{dataset: nuclei}}")
    config = load_config("own.yaml")
    assert config.train.lr == 3e-4
    assert config.model == load_config("coco-instance-r50").model
    assert config.data.dataset.name == "nuclei"


def test_a_study_of_ones_own_is_laid_over_shipped_files(folder):
    (folder / "sizes.yaml").write_text(STUDY)
    study = load_study("sizes.yaml", ["profile=mini"])
    assert study.base.model.backbone == load_config("mini-panoptic").model.backbone


def test_a_data_set_by_name_on_the_command_line():
    config = load_config("coco-tiny", ["data.dataset=cityscapes"])
    assert config.data.dataset.name == "cityscapes"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("coco-tinny", r"^no file coco-tinny; nearest: coco-tiny$"),
        ("mpformer-tabel8.yaml", r"^no file mpformer-tabel8\.yaml; nearest: mpformer-table8$"),
        (
            "experiments/recipes/coco-tiny.yaml",
            r"^no file .*\(there is no folder experiments/recipes\); nearest: coco-tiny$",
        ),
        ("nothing/like/it", r"^no file nothing/like/it \(there is no folder nothing/like\)$"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(wrong, message):
    with pytest.raises(InputError, match=message):
        load_config(wrong)


def test_a_wrong_data_set_is_told_the_nearest_data_set():
    with pytest.raises(InputError, match=r"data\.dataset: no file .*nucleii; nearest: nuclei$"):
        load_config("coco-tiny", ["data.dataset=nucleii"])


@pytest.mark.parametrize("among", [RECIPES, DATA_SETS])
def test_no_name_stands_for_two_files(among):
    names = [path.name for folder in among for path in (experiments() / folder).glob("*.yaml")]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert all(locate(name, Path(), among).is_file() for name in names)
