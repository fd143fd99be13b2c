"""Whole runs: interrupted, resumed, spread over workers, started from the weights of another."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mpformer.model.weights.checkpoints import latest
from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir
from tests.e2e.conftest import WITH_RAY, Cluster, start
from tests.e2e.faults import (
    assert_as_unbroken,
    at_step,
    interrupted,
    run_dir_of,
    starts,
    states,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _losses(run_dir: Path) -> dict[int, float]:
    return {p.step: p.values["train/loss"] for p in read_points(run_dir) if "train/loss" in p.values}


def test_killed_and_interrupted_the_same_command_goes_on(recipe: Path, head: Cluster) -> None:
    """Each of the two commands starts a Ray of its own, as on a machine without a cluster."""
    # long enough for a signal to come in its midst
    settings = ["train.length=30 steps", "evaluate.every=15 steps"]
    alone = [*settings, f"storage={recipe.parent / 'alone'}"]
    assert head.train(recipe, *alone).code == 0
    run_dir, unbroken = run_dir_of(recipe, *settings), run_dir_of(recipe, *alone)

    process = start("train", recipe, *settings, WITH_RAY)
    wait_for(at_step(run_dir, 3), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "summary.json").exists()
    first_mlflow_run = json.loads((run_dir / "mlflow.json").read_text())["run_id"]

    def second_has_logged() -> bool:
        # no checkpoint says so: the killed command's worker may write another one before it ends
        parts = sorted((run_dir / "metrics").glob("*.jsonl"))
        return len(parts) == 2 and parts[1].read_text().count("\n") > 1

    process = start("train", recipe, *settings, WITH_RAY)
    done, seconds = interrupted(process, second_has_logged)
    assert done.code == 130
    assert done.err == "mpformer: interrupted; the same command goes on where it stopped\n"
    assert seconds < 5
    assert states(recipe.parent / "runs") == {"KILLED"}
    lines = done.out.splitlines()  # nothing is waited for in silence
    for said in (
        "loading torch and Ray",
        "reading the annotations",
        "24 training and 5 validation",
        "1 training worker",
    ):
        assert any(said in line for line in lines), said

    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    assert sorted(_losses(run_dir)) == list(range(1, 31))
    assert [p.step for p in read_points(run_dir) if "val/PQ" in p.values] == [15, 30]
    assert len(starts(run_dir)) == 3
    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"] == first_mlflow_run
    assert_as_unbroken(run_dir, unbroken)

    again = head.command("train", recipe, *settings)
    assert again.code == 0, again.err
    assert len(starts(run_dir)) == 3


def test_two_workers_compute_what_one_computes(recipe: Path, head: Cluster) -> None:
    settings = ["train.length=5 steps", "train.seed=4", "evaluate.limit=1", "tracking.mlflow=null"]
    losses = {}
    # the number of workers is no part of a run's identity, so each gets a storage of its own
    for name, train in (("one", head.train), ("two", lambda *a: head.command("train", *a, WITH_RAY))):
        here = [*settings, f"storage={recipe.parent / name}", "cluster.workers=2"]
        done = train(recipe, *here)
        assert done.code == 0, done.err
        losses[name] = _losses(run_dir_of(recipe, *here))
    assert sorted(losses["one"]) == [1, 2, 3, 4, 5]
    # Sampled points and pilot noise are on: they belong to the sample, not to the worker. What is left is
    # rounding, unless it takes a mask logit across the threshold of masked attention: with this seed it
    # does not.
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)
    summary = json.loads((run_dir_of(recipe, *here) / "summary.json").read_text())
    assert summary["workers"] == 2


def test_a_run_starts_from_the_weights_of_another(recipe: Path, head: Cluster) -> None:
    first = ["train.length=3 steps", "tracking.mlflow=null"]
    done = head.train(recipe, *first)
    assert done.code == 0, done.err
    origin = run_dir_of(recipe, *first)
    second = [*first, f"train.init={origin}", "evaluate.at_start=true"]
    done = head.train(recipe, *second)
    assert done.code == 0, done.err
    found, _ = latest(origin)
    assert found is not None
    assert f"starts from {found.path / 'model.safetensors'}" in done.out
    assert "re-initialised" not in done.out + RunDir(run_dir_of(recipe, *second)).init.read_text()
    before, after = (
        {k: v for p in read_points(run_dir_of(recipe, *s)) if p.step == step for k, v in p.values.items()}
        for s, step in ((first, 3), (second, 0))
    )
    figures = [key for key in before if key.startswith("val/")]
    assert "val/PQ" in figures
    assert before["val/mIoU"] > 0
    assert {key: after[key] for key in figures} == {key: before[key] for key in figures}

    absent = head.train(recipe, *first, "train.init=nowhere")
    assert absent.code == 2
    assert "nowhere: no checkpoint" in absent.err
