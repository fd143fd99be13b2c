"""Whole runs whose evaluations go on beside training: the same record, cut off or not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir
from tests.e2e.conftest import Cluster, write_recipe
from tests.e2e.faults import assert_mirrored, at_step, difference, run_dir_of, values, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# views of up to 4 times the size: an evaluation takes long enough to be interrupted
COMMON = ["evaluate.at_start=true", "evaluate.scales=[1, 4]", "evaluate.flip=true"]


@pytest.fixture(scope="module")
def waited(head: Cluster, scenes: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that waits for its evaluations."""
    recipe = write_recipe(tmp_path_factory.mktemp("waited"), scenes, empty_store)
    done = head.train(recipe, *COMMON)
    assert done.code == 0, done.err
    return run_dir_of(recipe, *COMMON)


def test_a_run_killed_during_an_evaluation_has_the_points_of_one_that_waits(
    recipe: Path, waited: Path, head: Cluster
) -> None:
    settings = [*COMMON, "cluster.evaluators=1"]
    run_dir = run_dir_of(recipe, *settings)
    process = head.start("train", recipe, *settings)
    weights = RunDir(run_dir).evaluation(6)  # until the checkpoint after their evaluation
    wait_for(lambda: at_step(run_dir, 6)() and weights.exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = sorted(path.name for path in RunDir(run_dir).evaluations.iterdir())
    assert "step-00000006.safetensors" in left
    assert not any("val/PQ" in point.values for point in read_points(run_dir) if point.step == 6)

    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    assert [p.step for p in read_points(run_dir) if "val/PQ" in p.values] == [0, 6, 12]
    assert values(run_dir) == values(waited)
    assert difference(run_dir, waited) == 0
    assert_mirrored(run_dir)
    assert list(RunDir(run_dir).evaluations.iterdir()) == []


def test_two_evaluators_share_the_images(recipe: Path, waited: Path, head: Cluster) -> None:
    settings = [*COMMON, "cluster.evaluators=2"]
    run_dir = run_dir_of(recipe, *settings)
    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    assert values(run_dir) == values(waited)
    assert json.loads((run_dir / "summary.json").read_text())["workers"] == 1


def test_evaluators_that_do_not_fit_are_refused_with_the_arithmetic(recipe: Path, head: Cluster) -> None:
    refused = head.command("train", recipe, "cluster.evaluators=9999")
    assert refused.code == 2
    assert "1 workers and 9999 evaluators x 0.5 CPU + 1 for data" in refused.err
