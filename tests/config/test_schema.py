"""The settings reference and the JSON Schemas: made from the schema, complete, and true of what ships."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mpformer.cli.main import main
from mpformer.cli.reference import SCHEMAS, generated, schema_text
from mpformer.config import Config, flatten
from mpformer.config.schema import Setting, settings
from mpformer.config.yamlfile import read_settings

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SETTINGS = settings()
FILES = [
    *(("recipe", path) for path in sorted(EXPERIMENTS.glob("recipes/*.yaml"))),
    *(("data-set", path) for path in sorted(EXPERIMENTS.glob("data/*.yaml"))),
    *(("study", path) for path in sorted(EXPERIMENTS.glob("ablations/*.yaml"))),
    ("study", EXPERIMENTS / "quickstart.yaml"),
    ("study", EXPERIMENTS / "model-family.yaml"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.key} {' '.join(one.kinds)}".strip())
def test_every_setting_has_a_meaning_and_values(setting: Setting) -> None:
    assert len(setting.meaning) > 8
    assert setting.values not in ("", "any value")


def test_no_setting_is_missing_and_the_defaults_are_those_of_a_run() -> None:
    known = {one.key: one for one in SETTINGS if not one.kinds or "coco_instance" in one.kinds}
    for key, value in flatten(Config().model_dump(mode="json")).items():
        found = [one for one in SETTINGS if one.key == key]
        assert found, key
        if isinstance(value, int | str) and not isinstance(value, bool) and key in known:
            assert str(value) in [one.default for one in found], key


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_the_generated_files_are_up_to_date(path: Path) -> None:
    written = (ROOT / path).read_text(encoding="utf-8")
    assert written == generated()[path], "python -m mpformer.cli.reference"


def validator(kind: str) -> jsonschema.Draft7Validator:
    schema = json.loads(schema_text(kind))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


VALIDATORS = {kind: validator(kind) for kind in SCHEMAS}


@pytest.mark.parametrize(("kind", "path"), FILES, ids=[path.stem for _, path in FILES])
def test_what_ships_fits_its_schema(kind: str, path: Path) -> None:
    tree = json.loads(json.dumps(read_settings(path).tree))
    assert [error.message for error in VALIDATORS[kind].iter_errors(tree)] == []


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        ("recipe", {"train": {"lrr": 1}}),
        ("recipe", {"train": {"lr": "fast"}}),
        ("recipe", {"train": {"lr": 0}}),
        ("recipe", {"data": {"augment": {"size": [256]}}}),
        ("recipe", {"data": {"task": "instances"}}),
        ("recipe", {"train": {"optimizer": "torch.optim.SGD"}}),
        ("study", {"title": "x", "columns": {"val/AP": {"title": "AP"}}, "baseline": "a"}),
        (
            "study",
            {"title": "x", "columns": {}, "baseline": "a", "rows": {"a": {"settings": {"train.lrr": 1}}}},
        ),
        ("data-set", {"format": "label_maps", "train": {"images": "a", "labels": "b"}}),
    ],
)
def test_what_is_wrong_does_not_fit(kind: str, tree: dict[str, object]) -> None:
    assert not VALIDATORS[kind].is_valid(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"base": "other.yaml", "model": {"pilot": {"noise": {"kind": "shift", "ratio": 0.1}}}},
        {"model": {"pilot": {"noise": ["mine:Noise", {"kind": "point"}], "layers": [1, 2]}}},
        {"train": {"optimizer": "torch.optim:SGD", "schedule": "mine:Schedule"}},
        {"data": {"dataset": "file.yaml", "augment": {"flip": 0}}},
        {"data": {"dataset": {"train": {"share": [0, 0.8]}}}},
        {"evaluate": {"metrics": ["mine:Metric", {"kind": "mine:Metric", "options": {"a": 1}}]}},
    ],
)
def test_every_form_that_a_recipe_may_have_fits(tree: dict[str, object]) -> None:
    assert [error.message for error in VALIDATORS["recipe"].iter_errors(tree)] == []


def test_show_prints_the_reference_or_a_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--help-settings", "train.lr"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["train.lr=0.0001", "    a number above 0"]
    assert main(["show", "--help-settings"]) == 0
    every = capsys.readouterr().out
    assert all(f"\n{one.key}=" in f"\n{every}" for one in SETTINGS)
    assert main(["show", "--help-settings", "train.epochs"]) == 2
    assert capsys.readouterr().err == "mpformer: no setting 'train.epochs'; nearest: train.length\n"


def test_show_prints_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--json-schema", "study"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "mpformer: a study"
    assert main(["show", "--json-schema", "studies"]) == 2
    assert "nearest: study" in capsys.readouterr().err
    assert main(["show"]) == 2
    assert "a recipe is expected" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "path"), FILES, ids=[path.stem for _, path in FILES])
def test_what_ships_names_its_schema_for_editors(kind: str, path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == EXPERIMENTS / "schemas" / f"{kind}.json"
