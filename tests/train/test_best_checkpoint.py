"""The best checkpoint: kept while it is the best, read by default, told from the last."""

from pathlib import Path

import pytest
import torch

from mpformer.config import Config, dump_yaml, load_config
from mpformer.model.architecture import build_model
from mpformer.model.weights import checkpoints
from mpformer.model.weights.checkpoints import choose
from mpformer.model.weights.loading import load_checkpoint
from mpformer.tracking.record import RecordWriter
from mpformer.train import checkpoint
from mpformer.train.ema import WeightAverage
from mpformer.train.optim import build_optimizer
from mpformer.types import InputError


def with_keep(config: Config, **keep) -> Config:
    train = {**config.train.model_dump(), "keep": keep}
    return Config.model_validate({**config.model_dump(), "train": train})


@pytest.fixture
def trained(tmp_path, tiny_config):
    """`trained(values, **keep)`: the folder of a run with a checkpoint at each step, its figures as given.

    The bias of its class head is its step, that of its average ten times that.
    """

    def train(values: list[float | None], key: str = "val/AP", averaged: bool = False, **keep) -> Path:
        config = with_keep(tiny_config, **keep)
        (tmp_path / "config.yaml").write_text(dump_yaml(config))
        model = build_model(config.model, 3)
        optimizer, average = build_optimizer(model, config.train), WeightAverage(model, 0.5)
        writer = RecordWriter(tmp_path, 0)
        for step, value in enumerate(values, 1):
            torch.nn.init.constant_(model.decoder.class_embed.bias, step)
            average._averages["decoder.class_embed.bias"].fill_(10 * step)
            writer.add(step, {"train/loss": 1.0, **({} if value is None else {key: value})})
            checkpoint.save(tmp_path, step, model, optimizer, config, {}, average if averaged else None)
        return tmp_path

    return train


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoints.complete(run_dir)]


def bias(place: Path | str) -> float:
    return load_checkpoint(place)[0].decoder.class_embed.bias[0].item()


@pytest.mark.parametrize(
    ("values", "keep", "kept", "best"),
    [
        ([10, 30, 20, 25, 28], {"best": "val/AP", "last": 2}, [2, 4, 5], 2),
        ([10, 30, 20, 40, 28], {"best": "val/AP", "last": 1}, [4, 5], 4),
        ([10, 30, 20, 30], {"best": "val/AP", "last": 1}, [2, 4], 2),  # as good as is not better
        ([10, None, float("nan"), None], {"best": "val/AP", "last": 1}, [1, 4], 1),
        ([10, 30, 20], {"last": 1}, [3], None),
    ],
)
def test_the_best_is_kept_beside_the_newest_and_read_by_default(trained, values, keep, kept, best):
    run_dir = trained(values, **keep)
    assert steps(run_dir) == kept
    assert bias(run_dir) == (best or kept[-1])
    assert bias(Path(f"{run_dir}@last")) == kept[-1]
    assert checkpoints.latest(run_dir)[0].step == kept[-1], "training goes on from the newest"


def test_the_choice_is_told_in_one_line(trained):
    run_dir = trained([10, 60.12, 20], best="val/AP")
    note = f"best checkpoint: step 2 of 3, val/AP 60.1; {run_dir}@last for the last"
    assert choose(run_dir).note == choose(Path(f"{run_dir}@best")).note == note
    for place in (f"{run_dir}@last", run_dir / "checkpoints" / "step-00000003"):
        assert choose(Path(place)).note == ""


def test_of_losses_the_smallest_is_kept(trained):
    run_dir = trained([3.0, 2.0, 2.5, 4.0], "val/loss", best="val/loss", last=1)
    assert steps(run_dir) == [2, 4]
    assert ", val/loss 2.000; " in choose(run_dir).note


def test_what_was_chosen_by_the_average_is_the_average(trained):
    run_dir = trained([1.0, 3.0, 2.0], "val_ema/AP", averaged=True, best="val_ema/AP")
    assert bias(run_dir) == 20
    assert bias(Path(f"{run_dir}@last")) == 3
    assert bias(run_dir / "checkpoints" / "step-00000002") == 2


def test_a_damaged_best_one_is_passed_over_and_named(trained, caplog):
    run_dir = trained([10, 30, 20], best="val/AP", last=3)
    file = run_dir / "checkpoints" / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert bias(run_dir) == 3
    assert "step-00000002" in caplog.text


def test_a_run_without_a_best_one_says_so(trained):
    run_dir = trained([10, 30])
    assert choose(run_dir).note == ""
    with pytest.raises(InputError, match=r"@best: no best checkpoint: train\.keep\.best names"):
        choose(Path(f"{run_dir}@best"))
    with pytest.raises(InputError, match="nowhere: no checkpoint"):
        choose(Path("nowhere@last"))


def test_one_that_is_being_evaluated_stays_until_its_figure_is_known(tmp_path, trained, tiny_config):
    run_dir = trained([10, None, None], best="val/AP", last=1)
    keep = with_keep(tiny_config, best="val/AP", last=1).train.keep
    assert steps(run_dir) == [1, 3]
    waiting = run_dir / "evaluations" / "step-00000001.safetensors"
    waiting.parent.mkdir()
    RecordWriter(run_dir, 3).add(3, {"val/AP": 20.0})
    assert [path.name for path in checkpoints.superseded(run_dir, keep)] == ["step-00000001"]
    waiting.write_bytes(b"")  # step 1 has a figure: this one is of no account any more
    assert [path.name for path in checkpoints.superseded(run_dir, keep)] == ["step-00000001"]
    (run_dir / "metrics" / "0001.jsonl").write_text('{"start_step": 0, "time": 0}\n')
    assert checkpoints.superseded(run_dir, keep) == []


def test_the_old_name_of_the_number_of_checkpoints():
    """Recipes, run folders and headers of checkpoints have it."""
    old = Config.model_validate({"train": {"keep_checkpoints": 5, "keep": {"best": "val/AP"}}})
    assert (old.train.keep.last, old.train.keep.best) == (5, "val/AP")
    assert Config.model_validate_json('{"train": {"keep_checkpoints": 2}}') == Config()
    with pytest.raises(ValueError, match=r"keep_checkpoints: the old name of keep\.last"):
        Config.model_validate({"train": {"keep_checkpoints": 5, "keep": {"last": 2}}})


@pytest.mark.parametrize(
    ("written", "settings", "told"),
    [
        (
            "keep_checkpoints: 0",
            [],
            "R:4: train: keep_checkpoints: expected a whole number of at least 1 (given: 0)",
        ),
        (
            "keep_checkpoints: [2]",
            [],
            "R:4: train: keep_checkpoints: expected a whole number of at least 1 (given: [2])",
        ),
        (
            "keep: {last: 2}",
            ["train.keep_checkpoints=some"],
            "setting 'train.keep_checkpoints=some': train: ",
        ),
        (
            "batch_size: 2",
            ["train.keep_checkpoints=0"],
            "setting 'train.keep_checkpoints=0': train: keep_checkpoints: exp",
        ),
        (
            "keep_checkpoints: 3\n  keep: {last: 2}",
            [],
            "R:4: train: keep_checkpoints: the old name of keep.last: one of the two is expected",
        ),
    ],
)
def test_a_bad_value_under_the_old_name_is_told_where_it_is_written(tmp_path, written, settings, told):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\ntrain:\n  lr: 1e-3\n  {written}\n")
    with pytest.raises(InputError) as caught:
        load_config(recipe, settings)
    assert str(caught.value).startswith(told.replace("R:", f"{recipe}:"))
