"""Whole runs through Ray: interrupted, resumed, spread over workers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from mpformer.config import load_config, run_name
from mpformer.model.weights import checkpoints
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import read_points
from tests.e2e.conftest import run, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _run_dir(recipe: Path, *overrides: str) -> Path:
    config = load_config(recipe, list(overrides))
    return Path(config.storage) / run_name(config)


def _losses(run_dir: Path) -> dict[int, float]:
    return {p.step: p.values["train/loss"] for p in read_points(run_dir) if "train/loss" in p.values}


def test_kill_the_driver_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    run_dir = _run_dir(recipe)
    process = start("train", recipe)
    deadline = time.monotonic() + 300
    while not checkpoints.complete(run_dir):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "summary.json").exists()
    first_mlflow_run = json.loads((run_dir / "mlflow.json").read_text())["run_id"]

    finished = run("train", recipe, timeout=400)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12

    # the record: each step once, evaluation at 6 and 12, more than one part was written
    assert sorted(_losses(run_dir)) == list(range(1, 13))
    evaluated = [p.step for p in read_points(run_dir) if "val/PQ" in p.values]
    assert evaluated == [6, 12]
    assert len(list((run_dir / "metrics").glob("*.jsonl"))) == 2

    # MLflow: the same run, the same points, none double
    link = json.loads((run_dir / "mlflow.json").read_text())
    assert link["run_id"] == first_mlflow_run
    history = client(link["uri"]).get_metric_history(link["run_id"], "train/loss")
    assert {m.step: m.value for m in history} == pytest.approx(_losses(run_dir))
    assert len(history) == 12

    # an unbroken run of the same settings computes the same losses to the last bit
    other = tmp_path / "unbroken.yaml"
    tree = yaml.safe_load(recipe.read_text()) | {"storage": str(tmp_path / "unbroken"), "name": "tiny"}
    other.write_text(yaml.safe_dump(tree))
    assert run("train", other, timeout=400).returncode == 0
    assert _losses(_run_dir(other)) == _losses(run_dir)

    again = run("train", recipe)
    assert again.returncode == 0
    assert len(list((run_dir / "metrics").glob("*.jsonl"))) == 2


def test_two_workers_compute_what_one_computes(recipe: Path) -> None:
    losses = {}
    for workers in (1, 2):
        settings = [f"cluster.workers={workers}", "train.length=5 steps", "train.seed=4", "evaluate.limit=1"]
        # the number of workers is no part of a run's identity, so each gets a storage of its own
        settings.append(f"storage={recipe.parent / str(workers)}")
        finished = run("train", recipe, *settings, timeout=400)
        assert finished.returncode == 0, finished.stderr
        losses[workers] = _losses(_run_dir(recipe, *settings))
    assert sorted(losses[1]) == [1, 2, 3, 4, 5]
    # Sampled points and pilot noise are on: they belong to the sample, not to the worker. What is left is
    # rounding, unless it takes a mask logit across the threshold of masked attention: with seed 3 it does so
    # in step 5 (1.3e-4), with this one it does not.
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


def test_a_run_starts_from_the_weights_of_another(recipe: Path, tmp_path: Path) -> None:
    first = ["train.length=3 steps", "train.checkpoint_every=3 steps"]
    assert run("train", recipe, *first, timeout=300).returncode == 0
    origin = _run_dir(recipe, *first)
    second = [*first, f"train.init={origin}", "evaluate.at_start=true"]
    finished = run("train", recipe, *second, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert f"starts from {checkpoints.latest(origin)[0].path / 'model.safetensors'}" in finished.stdout
    assert "re-initialised" not in finished.stdout
    before, after = (
        {k: v for p in read_points(_run_dir(recipe, *s)) if p.step == step for k, v in p.values.items()}
        for s, step in ((first, 3), (second, 0))
    )
    figures = [key for key in before if key.startswith("val/")]
    assert "val/PQ" in figures
    assert before["val/mIoU"] > 0
    assert {key: after[key] for key in figures} == {key: before[key] for key in figures}

    absent = run("train", recipe, *first, "train.init=nowhere", timeout=60)
    assert absent.returncode == 2
    assert "nowhere: no checkpoint" in absent.stderr
