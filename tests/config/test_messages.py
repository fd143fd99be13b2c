"""What is said of wrong settings: our words, the nearest name, and the place where the value was given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpformer.config import build_config, load_config
from mpformer.config.nearest import nearest
from mpformer.config.schema import Setting, settings
from mpformer.config.yamlfile import Source
from mpformer.types import InputError

WRONG = ["abc", "-7", "1.5", "true", "[]", "[1, x, {a: b}]", "{a: 1}", "null", "[[]]"]
PYDANTICS = re.compile(
    "Input should|Unable to|Field required|validation error|Value error|Extra inputs|should have at|pydantic|"
    "valid (dictionary|tuple|list|string|number|integer|boolean)|constrained|[Dd]iscriminator|instance of|"
    "type="
)
UNIONS = ("data.augment", "data.dataset", "train.schedule", "model.pilot.noise")


def told(*overrides: str) -> str:
    """What is said of settings of the command line; empty where nothing is wrong."""
    try:
        build_config(Source(Path("recipe.yaml"), {}, {}).overridden(overrides))
    except InputError as error:
        return str(error)
    return ""


def kind_of(setting: Setting) -> list[str]:
    """What makes the setting one of the recipe's."""
    union = next((name for name in UNIONS if setting.key.startswith(f"{name}.") and setting.kinds), None)
    tag = "format" if union == "data.dataset" else "kind"
    return [f"{union}={{{tag}: {setting.kinds[0]}}}"] if union else []


@pytest.mark.parametrize("setting", settings(), ids=lambda one: f"{one.key} {' '.join(one.kinds)}".strip())
def test_whatever_is_written_is_told_in_our_words(setting: Setting) -> None:
    if "*" in setting.key:
        pytest.skip("of an entry of a list: the command line gives the list")
    found = {}
    for value in WRONG:
        message = found[value] = told(*kind_of(setting), f"{setting.key}={value}")
        assert not PYDANTICS.search(message), message
        assert "\n" not in message
        assert "recipe.yaml" not in message.partition(": ")[0] or kind_of(setting), message
    assert any(found.values()) or setting.values.startswith("text"), "everything is accepted"


@pytest.mark.parametrize(
    "section", ["model", "data", "train", "evaluate", "cluster", "tracking", *UNIONS, "model.loss"]
)
@pytest.mark.parametrize("value", ["5", "abc", "[1]", "null", "{kind: 7}", "{kind: null}"])
def test_a_section_that_is_none_is_told_in_our_words(section: str, value: str) -> None:
    message = told(f"{section}={value}")
    assert not PYDANTICS.search(message), message
    assert section in message or (section, value) == ("data.dataset", "null")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr=fast", "setting 'train.lr=fast': train.lr: expected a number above 0 (given: 'fast')"),
        ("train.seed=1.5", "train.seed: expected a whole number of at least 0 (given: 1.5)"),
        ("model.decoder.dropout=2", "model.decoder.dropout: expected a number from 0 to 1 (given: 2)"),
        (
            "data.augment.size=[64]",
            "data.augment.size: expected a list of 2, each a whole number of at least 1",
        ),
        ("model.decoder.self_attention=7", "model.decoder.self_attention: expected true or false (given: 7)"),
        ("model.loss.match_points=many", "'many' is none of 'as_loss'; nearest: as_loss"),
        ("data.loader=5", "data.loader: expected ray, torch or inline (given: 5)"),
        ("train=5", "train: expected a section of settings (given: 5)"),
        (
            "train.schedule=5",
            "train.schedule: expected a section with kind: step, poly or package.module:Name (given: 5)",
        ),
        (
            "data.dataset={format: label_maps}",
            "data.dataset.train: not given; expected a section of settings",
        ),
    ],
)
def test_what_is_expected_is_said(setting: str, message: str) -> None:
    assert message in told(setting)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("train.epochs=12", "train.length"),
        ("train.learning_rate=1", "train.lr"),
        ("epochs=12", "train.length"),
        ("train.image_size=64", "data.augment.size"),
        ("data.num_workers=4", "data.loader_processes"),
        ("model.backbone.norm=batch_norm", "bn"),
        ("model.backbone.norm=BatchNorm2d", "bn"),
        ("data.task=instances", "instance"),
        ("data.task=semantic_segmentation", "semantic"),
        ("train.precision=fp16", "bfloat16"),
        ("train.schedule.kind=cosine", "poly"),
        ("data.augment.sclae=[1]", "data.augment.scale"),
    ],
)
def test_the_nearest_name_is_that_of_the_same_thing(setting: str, name: str) -> None:
    assert told(setting).endswith(f"nearest: {name}"), told(setting)


def test_a_setting_of_another_kind_is_not_proposed_for_itself() -> None:
    message = told("data.augment={kind: short_edge_jitter}", "data.augment.longs=5")
    assert message.endswith("nearest: data.augment.long")


def test_what_other_programs_say_yields_to_what_is_there() -> None:
    assert nearest("epochs", ["epoch_count", "steps"]) == "epoch_count"


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (
            ["model.decoder.layers=3"],
            "setting 'model.decoder.layers=3': model: pilot.layers: the decoder has",
        ),
        (["train.seed=3"], "recipe.yaml:3: model: pilot.layers"),
        (
            ["model.pilot={layers: [9]}", "model.decoder={layers: 2}"],
            "setting 'model.decoder={layers: 2}' and setting 'model.pilot={layers: [9]}': model",
        ),
        (["model.pilot={layers: [0]}", "model.decoder={layers: 9}"], "setting 'model.pilot={layers: [0]}': "),
    ],
)
def test_a_value_of_the_command_line_is_not_blamed_on_a_file(
    tmp_path: Path, settings: list[str], place: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    layers = 2 if settings == ["train.seed=3"] else 9
    recipe.write_text(f"model:\n  decoder: {{layers: {layers}}}\n  pilot: {{layers: [9]}}\n")
    with pytest.raises(InputError) as caught:
        load_config(recipe, settings)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(place)
