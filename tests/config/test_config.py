"""Settings: loading, base files, overrides, what a wrong one is told, identity."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpformer.config import (
    Config,
    config_hash,
    diff,
    dump_yaml,
    duration_in_steps,
    identity_settings,
    load_config,
    run_name,
)
from mpformer.config.yamlfile import nearest, parse_scalar
from mpformer.types import InputError

RECIPE = """\
# a comment
data:
  dataset: set.yaml
  root: folder
train:
  lr: 5e-4
  schedule:
    kind: step
    at: [0.5]
model:
  pilot: {queries: 10}
"""
DATASET = """\
format: coco_panoptic
train: {images: a, annotations: a.json, panoptic_masks: a_masks}
val: {images: b, annotations: b.json, panoptic_masks: b_masks}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "set.yaml").write_text(DATASET)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_the_defaults_with_its_settings_and_its_data_set_file(recipe):
    config = load_config(recipe)
    assert config.name == "recipe"
    assert config.train.lr == 5e-4  # YAML 1.1 would read this as text
    assert config.train.batch_size == Config().train.batch_size
    assert config.data.dataset.name == "set"
    assert config.data.dataset.val.panoptic_masks == "b_masks"


def test_a_base_lies_under_a_recipe_and_overrides_over_both(recipe):
    upper = recipe.with_name("upper.yaml")
    upper.write_text("base: recipe.yaml\ntrain: {lr: 0.1, batch_size: 2}\n")
    config = load_config(upper, ["train.batch_size=4", "model.pilot.layers=[1, 2]", "evaluate.every=5 steps"])
    assert (config.train.lr, config.train.batch_size) == (0.1, 4)
    assert config.model.pilot.queries == 10
    assert config.model.pilot.layers == (1, 2)
    assert config.evaluate.every == "5 steps"
    assert config.name == "upper"


def test_only_one_level_of_base(recipe):
    recipe.with_name("upper.yaml").write_text("base: recipe.yaml\n")
    top = recipe.with_name("top.yaml")
    top.write_text("base: upper.yaml\n")
    with pytest.raises(InputError, match="a base has no base of its own"):
        load_config(top)


def test_a_section_of_another_kind_replaces_the_whole_section(recipe):
    config = load_config(recipe, ["train.schedule={kind: poly, power: 0.8}"])
    assert config.train.schedule.model_dump() == {"kind": "poly", "power": 0.8}
    upper = recipe.with_name("upper.yaml")
    upper.write_text("base: recipe.yaml\ntrain: {schedule: {kind: poly}}\n")
    assert load_config(upper).train.schedule.kind == "poly"


def test_a_data_set_file_of_the_command_line_is_relative_to_the_working_folder(recipe, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text(DATASET.replace("a.json", "mine.json"))
    monkeypatch.chdir(tmp_path / "sub")
    config = load_config(recipe, ["data.dataset=mine.yaml"])
    assert (config.data.dataset.name, config.data.dataset.train.annotations) == ("mine", "mine.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 5e-4", "lrr: 5e-4", r"recipe\.yaml:6: no setting 'train\.lrr'; nearest: train\.lr$"),
        ("lr: 5e-4", "lr: fast", r"recipe\.yaml:6: train\.lr: .*number.*\(given: 'fast'\)"),
        ("lr: 5e-4", "lr: -1", r"recipe\.yaml:6: train\.lr: expected a number above 0 \(given: -1\)"),
        ("at: [0.5]", "at: [1.5]", r"recipe\.yaml:9: train\.schedule\.at\.0: expected a number from 0 to 1"),
        (
            "kind: step",
            "kind: cosine",
            r"recipe\.yaml:8: train\.schedule\.kind: 'cosine' is none of 'step', 'poly', "
            "'package.module:Name'; nearest: poly",
        ),
        ("queries: 10", "querys: 10", r"recipe\.yaml:11: no setting .*nearest: model\.pilot\.queries$"),
        (
            "queries: 10",
            "layers: [99]",
            r"recipe\.yaml:11: model: pilot\.layers: the decoder has layers 1 to 9",
        ),
        ("root: folder", "roots: folder", r"recipe\.yaml:4: .*nearest: data\.root$"),
        ("root: folder", "augment: {size: [100, 100]}", r"augment: size: multiples of 32 expected"),
        ("model:", "modle:", r"recipe\.yaml:10: no setting 'modle'; nearest: model$"),
        (
            "dataset: set.yaml",
            "dataset: sett.yaml",
            r"recipe\.yaml:3: data\.dataset: no file .*nearest: .*set\.yaml",
        ),
        (
            "lr: 5e-4",
            "lr: 5e-4\n  lr: 1",
            r"recipe\.yaml:7: not valid YAML: duplicate key 'lr'",
        ),
        ("train:", "train: [", r"recipe\.yaml:\d+: not valid YAML"),
        (RECIPE, "- a list", "a mapping of settings is expected, not a list"),
        (RECIPE, "base: rezipe.yaml", r"recipe\.yaml: base: no file .*nearest: .*recipe\.yaml"),
    ],
)
def test_a_wrong_recipe_is_told_file_line_key_and_the_nearest_right_name(recipe, old, new, message):
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_config(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", r"expected key\.sub=value"),
        ("=3", r"expected key\.sub=value"),
        ("train..lr=3", r"expected key\.sub=value"),
        ("train.lr=[1", "the value is not YAML"),
        ("train.length=5 minutes", "expected a length such as"),
        ("train.batch_size=0", r"setting 'train\.batch_size=0': .*a whole number of at least 1"),
        ("modell.pilot.queries=3", r"nearest: model"),
        ("train.keep.best=AP", r"train\.keep\.best: a figure of the evaluations is expected, such as val/AP"),
        ("train.stop_early={metric: val/AP}", r"patience"),
        ("train.ema=1", r"below 1"),
        ("train.keep.lasts=1", r"nearest: train\.keep\.last"),
    ],
)
def test_a_wrong_override(recipe, override, message):
    with pytest.raises(InputError, match=message):
        load_config(recipe, [override])


def test_the_dump_loads_to_the_same_settings(recipe):
    config = load_config(recipe, ["train.precision=float32", "model.pilot.layers=[2]", "name=Grüße"])
    dumped = recipe.with_name("dumped.yaml")
    dumped.write_text(dump_yaml(config))
    assert load_config(dumped) == config


def test_identity_depends_on_what_is_computed_alone(recipe):
    config = load_config(recipe)
    same = ["storage=elsewhere", "cluster.workers=4", "tracking.mlflow=null", "evaluate.every=1 steps"]
    same += ["train.log_every=1", "train.micro_batch=2", "train.checkpoint_every=1 steps", "data.prefetch=0"]
    same += ["train.keep={best: val/AP, last: 5}", "evaluate.loss=true", "evaluate.pictures=0"]
    assert run_name(load_config(recipe, same)) == run_name(config)
    # a setting written out at its default is no difference
    assert run_name(load_config(recipe, ["train.batch_size=16"])) == run_name(config)
    other = {
        config_hash(load_config(recipe, [s]))
        for s in ("train.lr=1", "model.loss.points=7", "data.task=semantic")
    }
    assert len(other | {config_hash(config)}) == 4
    assert config_hash(load_config(recipe, ["train.seed=5"])) == config_hash(config)
    assert run_name(load_config(recipe, ["train.seed=5"])) == run_name(config).replace("-s0", "-s5")
    assert "train.lr" in identity_settings(config)
    assert not any(key.startswith(("cluster", "tracking", "storage")) for key in identity_settings(config))


def test_with_early_stopping_evaluation_belongs_to_the_identity(recipe):
    """It decides then when training ends."""
    rule = "train.stop_early={metric: val/AP, patience: 3}"
    names = {
        run_name(load_config(recipe, [*settings]))
        for settings in ((), (rule,), (rule, "evaluate.every=5 steps"), (rule, "evaluate.limit=5"))
    }
    assert len(names) == 4
    assert run_name(load_config(recipe, [rule, "evaluate.pictures=0"])) == run_name(
        load_config(recipe, [rule])
    )
    assert len({config_hash(load_config(recipe, [s])) for s in ("train.ema=0.9", "train.ema=0.99")}) == 2


def test_diff_names_both_values(recipe):
    a, b = load_config(recipe), load_config(recipe, ["train.schedule={kind: poly}", "train.lr=1"])
    assert diff(a, b) == {
        "train.lr": (5e-4, 1.0),
        "train.schedule.kind": ("step", "poly"),
        "train.schedule.at": ([0.5], None),
        "train.schedule.factor": (0.1, None),
        "train.schedule.power": (None, 0.9),
    }
    assert diff(a, a) == {}


@pytest.mark.parametrize(
    ("length", "images", "batch", "steps"),
    [
        ("50 epochs", 118287, 16, 369647),  # 50 x 118287 / 16 = 369646.9
        ("1 epoch", 10, 4, 3),
        ("600 steps", 0, 16, 600),
        ("100 images", 0, 8, 13),
        ("0.5 epochs", 100, 10, 5),
        ("1 images", 0, 8, 1),
    ],
)
def test_lengths_in_steps_are_rounded_up(length, images, batch, steps):
    assert duration_in_steps(length, images, batch) == steps


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
@settings(max_examples=200, deadline=None)
def test_every_scalar_that_yaml_writes_is_read_back(value):
    assert parse_scalar(yaml.safe_dump(value).removesuffix("...\n").strip()) == value


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E3", 2000.0), ("-1e5", -1e5), ("1e", "1e"), ("e4", "e4")]
)
def test_numbers_as_people_write_them(text, value):
    assert parse_scalar(text) == value


def test_the_nearest_name_prefers_the_same_last_word():
    names = ["train.lr", "model.pilot.queries", "model.decoder.queries"]
    assert nearest("pilot.queries", names) == "model.pilot.queries"
    assert nearest("trian.lr", names) == "train.lr"
    assert nearest("modell", names, sections=True) == "model"


MASKFORMER = {"features": "stride_32", "memory": "backbone", "query_features": "zero"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"decoder": {"memory": "backbone"}}, "decoder.features must be stride_32"),
        ({"decoder": {"layers": 0, "query_features": "zero"}}, "only supervised query_features predict"),
        ({"decoder": MASKFORMER, "pilot": {"query_positions": False}}, "all queries the same"),
        ({"output": "per_pixel"}, "pilot.queries: a per-pixel model has no objects"),
        ({"output": "per_pixel", "pilot": {"queries": 0}}, "data.task must be semantic"),
        ({"loss": {"assignment": "fixed"}}, "data.task must be semantic"),
        ({"loss": {"assignment": "fixed", "match_by": "boxes"}}, "nothing is matched"),
    ],
)
def test_settings_of_the_family_that_contradict_each_other(model, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"model": model})


@pytest.mark.parametrize(
    ("written", "expected"), [("yes", "yes"), ("no", "no"), ("auto", "auto"), ("'yes'", "yes")]
)
def test_yes_and_no_need_no_quotes(recipe, written, expected):
    """YAML's own reading of a bare yes is a truth value."""
    assert load_config(recipe, [f"cluster.gpu={written}"]).cluster.gpu == expected
