"""Ctrl-C: one line, soon, and nothing that seems to run on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpformer.ablation.spec import load_study
from mpformer.cores import usable_cores
from mpformer.model.weights.checkpoints import complete
from mpformer.tracking.mlflow_store import client
from tests.e2e.conftest import Done, finish, start
from tests.e2e.faults import run_dir_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = ["train.length=100000 steps", "train.checkpoint_every=3 steps", "evaluate.every=null"]


def interrupted(process: subprocess.Popen[str], ready: Callable[[], bool]) -> tuple[Done, float]:
    """Ctrl-C of a terminal, which reaches all processes of the group; the seconds until the end.

    On a machine with more to do than it has cores they count as that much less.
    """
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=120)
        seconds = time.monotonic() - began
        done = finish(process, timeout=120)  # once all of the group have closed the pipe
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would run on beside all other tests
        raise
    return done, seconds / max(1.0, os.getloadavg()[0] / usable_cores())


def states(folder: Path) -> set[str]:
    """Of all runs in the MLflow store of a storage folder."""
    store = client(f"sqlite:///{folder / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in store.search_experiments()]
    return {run.info.status for run in store.search_runs(ids)}


def test_ctrl_c_in_train_is_one_line_within_five_seconds(recipe: Path) -> None:
    run_dir = run_dir_of(recipe, *LONG)
    process = start("train", recipe, *LONG)
    done, seconds = interrupted(process, lambda: bool(complete(run_dir)))
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


def test_ctrl_c_in_ablate_is_no_finished_study(recipe: Path) -> None:
    path = recipe.parent / "study.yaml"
    path.write_text(
        "title: x\nbase: tiny.yaml\ncolumns: {val/AP: {title: AP}}\nbaseline: a\n"
        "rows: {a: {}, b: {settings: {train.lr: 1e-4}}}\n"
    )
    trials = load_study(path, LONG).trials()
    process = start("ablate", path, *LONG)
    done, seconds = interrupted(process, lambda: any(complete(trial.run_dir) for trial in trials))
    assert done.code == 130
    assert done.err.splitlines()[-1] == "mpformer: interrupted; the same command goes on where it stopped"
    assert seconds < 10
    assert "report:" not in done.out
    assert states(recipe.parent / "runs") == {"KILLED"}
