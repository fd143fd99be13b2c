"""Whole runs that are judged by their evaluations or go on from others, cut off in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpformer.model.weights.checkpoints import EMA_FILE, MODEL_FILE, choose, complete
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import read_points
from mpformer.train import reporter
from mpformer.types import RunError
from tests.e2e.conftest import Cluster
from tests.e2e.faults import assert_as_unbroken, run_dir_of, starts, values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AtCheckpoint = Callable[[int, Callable[[], object]], None]


def cut_off() -> None:
    raise RunError("cut off")


def test_a_longer_run_from_a_shorter_one_is_the_long_run(
    recipe: Path, unbroken: Path, head: Cluster, at_checkpoint: AtCheckpoint
) -> None:
    """Half as long, it never comes to the lower rates at the end: its six steps are those of the long run."""
    half = ["train.length=6 steps"]
    done = head.train(recipe, *half)
    assert done.code == 0, done.err
    parent = run_dir_of(recipe, *half)

    longer = [f"train.resume_from={parent}"]
    run_dir = run_dir_of(recipe, *longer)
    assert run_dir != run_dir_of(recipe)
    at_checkpoint(9, cut_off)
    assert head.train(recipe, *longer).code == 1
    done = head.train(recipe, *longer)
    assert done.code == 0, done.err
    assert starts(run_dir) == [0, 6, 9]
    assert_as_unbroken(run_dir, unbroken)  # from the first step on, in MLflow, too

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["resumed_from"] == {"run": parent.name, "step": 6}
    link = json.loads((run_dir / "mlflow.json").read_text())
    tags = client(link["uri"]).get_run(link["run_id"]).data.tags
    assert (tags["resumed_from"], tags["resumed_at_step"]) == (parent.name, "6")

    again = head.train(recipe, *half)  # the other run is as it was
    assert again.code == 0
    assert starts(parent) == [0]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Evaluations whose PQ is the next of a list, whatever was predicted."""
    figures: list[float] = []
    measure = reporter.measure

    def measured(*arguments):
        found = measure(*arguments)
        scores = replace(found.scores, summary={**found.scores.summary, "PQ": figures.pop(0)})
        return replace(found, scores=scores)

    monkeypatch.setattr(reporter, "measure", measured)
    return figures


def test_average_best_and_early_end_over_two_interruptions_and_the_training_is_that_of_a_plain_run(
    recipe: Path, unbroken: Path, head: Cluster, at_checkpoint: AtCheckpoint, scripted: list[float]
) -> None:
    settings = [
        *("train.ema=0.9", "train.keep={best: val/PQ, last: 12}", "evaluate.loss=true"),
        *("train.stop_early={metric: val/PQ, patience: 2}", "train.checkpoint_every=1 steps"),
        *("evaluate.every=2 steps", "evaluate.limit=2", "tracking.mlflow=null"),
    ]
    run_dir = run_dir_of(recipe, *settings)
    at_checkpoint(5, cut_off)
    scripted += [10, 1, 30, 2]  # of steps 2 and 4: of the weights, then of their average
    assert head.train(recipe, *settings).code == 1
    at_checkpoint(8, cut_off)  # the end was decided, and is not written down yet
    scripted += [20, 3, 25, 4]
    assert head.train(recipe, *settings).code == 1
    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    assert starts(run_dir) == [0, 5, 8]
    assert scripted == []

    assert "ended at step 8: no better val/PQ in 2 evaluations after step 4" in done.out
    assert f"best checkpoint: step 4 of 8, val/PQ 30.0; {run_dir}@last for the last" in done.out
    assert choose(run_dir).file.parent.name == "step-00000004"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["images_seen"], summary["metrics"]["val/PQ"]) == (8, 32, 25)
    assert summary["stopped_early"].startswith("no better val/PQ")
    assert summary["metrics"]["val_ema/PQ"] == 4

    # neither average nor losses nor evaluations have changed a bit of the training
    ours, plain = values(run_dir), values(unbroken)
    trained = {key for key in plain if key[1].startswith("train/") and key[0] <= 8}
    assert {key: ours[key] for key in trained} == {key: plain[key] for key in trained}
    assert [p.step for p in read_points(run_dir) if p.values.get("val/loss", 0) > 0] == [2, 4, 6, 8]

    # the average of all the weights on disk, worked out here
    folders = complete(run_dir)
    assert len(folders) == 8
    name = "decoder.class_embed.weight"
    weights = {step: load_file(folder / MODEL_FILE)[name] for step, folder in enumerate(folders, 1)}
    averages = {step: load_file(folder / EMA_FILE)[name] for step, folder in enumerate(folders, 1)}
    for step in range(2, 9):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * averages[step - 1].double() + (1 - decay) * weights[step].double()
        torch.testing.assert_close(averages[step].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averages[8], weights[8])
