"""Ctrl-C in a study: one line, soon, and nothing that seems to run on. In a run: test_training.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpformer.ablation.spec import load_study
from mpformer.model.weights.checkpoints import complete
from tests.e2e.conftest import start
from tests.e2e.faults import interrupted, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = ["train.length=100000 steps", "train.checkpoint_every=3 steps", "evaluate.every=null"]


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
