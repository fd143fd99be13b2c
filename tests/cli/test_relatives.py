"""A run that could go on from another is told of it, with the command for that."""

import shlex
from pathlib import Path

import pytest

from mpformer.cli.parser import parse
from mpformer.cli.relatives import way_on
from mpformer.config import dump_yaml, load_config, run_name

RECIPE = "train: {length: 400 steps, seed: 3}\nmodel: {decoder: {queries: 20}}\n"


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "my recipe.yaml"
    path.write_text(f"{RECIPE}storage: {tmp_path}/runs\nname: mine\n")
    return path


def have(recipe: Path, step: int, *settings: str) -> Path:
    """A run's folder, with a checkpoint of that step."""
    config = load_config(recipe, settings)
    run_dir = Path(config.storage) / run_name(config)
    (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    return run_dir


def told(recipe: Path, *settings: str) -> str | None:
    config = load_config(recipe, settings)
    return way_on(str(recipe), settings, config, Path(config.storage) / run_name(config))


def test_a_run_of_another_length_is_named_with_the_command_that_goes_on_from_it(recipe):
    shorter = have(recipe, 300, "train.length=200 steps")
    other = have(recipe, 400)
    line = told(recipe, "train.length=800 steps", "train.lr=1e-5")
    assert line.startswith(
        f"{other}, at step 400, differs in train.length, train.lr alone; to go on from there: "
    )
    assert str(shorter) not in line, "of several the one that has got furthest"
    command = shlex.split(line.partition("to go on from there: mpformer ")[2])
    _, arguments = parse(command)
    assert Path(arguments["recipe"]) == recipe
    config = load_config(arguments["recipe"], arguments["settings"])
    assert (config.train.length, config.train.resume_from) == ("800 steps", str(other))


@pytest.mark.parametrize(
    "settings",
    [
        ["train.length=800 steps", "model.decoder.queries=10"],  # another model
        ["train.length=800 steps", "train.seed=4"],
        ["train.length=800 steps", "name=other"],
        ["train.length=399 steps"],  # over before
        ["train.length=400 steps"],  # the run itself
        ["train.length=800 steps", "train.resume_from=elsewhere"],  # was thought of
    ],
)
def test_others_are_not_named(recipe, settings):
    have(recipe, 400)
    assert told(recipe, *settings) is None


def test_a_folder_that_is_no_run_of_this_version_is_passed_over(recipe):
    broken = have(recipe, 400)
    (broken / "config.yaml").write_text("train: {lengthy: 3}\n")
    (broken.parent / "mine-notes").mkdir()
    assert told(recipe, "train.length=2 epochs") is None
