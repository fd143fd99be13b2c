"""Faults of one machine: after each the run is what it would have been without."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpformer.model.weights.checkpoints import complete
from mpformer.train import launch
from tests.e2e.conftest import WITH_RAY, Cluster, Done
from tests.e2e.faults import (
    assert_as_unbroken,
    at_step,
    difference,
    meanwhile,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    starts,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_worker_is_replaced(recipe: Path, unbroken: Path, head: Cluster) -> None:
    run_dir = run_dir_of(recipe)
    killed: list[float] = []

    def kill() -> None:
        (worker,) = head.processes("RayTrainWorker")
        worker.kill()
        killed.append(time.time())

    with meanwhile(at_step(run_dir, 3), kill):
        done = head.command("train", recipe, WITH_RAY)
    assert done.code == 0, done.err
    assert len(starts(run_dir)) == 2
    assert_as_unbroken(run_dir, unbroken)
    seconds = seconds_until_step_goes_on(run_dir, killed[0])
    note("worker killed (kill -9)", seconds=seconds, lost=0, difference=difference(run_dir, unbroken))


def test_a_second_driver_refuses(
    recipe: Path,
    head: Cluster,
    at_checkpoint: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "SECONDS_OF_AN_ORPHAN", 0.5)
    second: list[Done] = []
    at_checkpoint(3, lambda: second.append(head.train(recipe)))
    done = head.train(recipe)
    assert second[0].code == 1
    assert "another process is at work on this run" in second[0].err
    assert second[0].err.count("\n") == 1
    assert done.code == 0, done.err
    assert len(starts(run_dir_of(recipe))) == 1
    note("two drivers for one run: the second refuses", seconds=None, lost=0, difference=0.0)


def test_damaged_checkpoints_are_passed_over(
    recipe: Path, unbroken: Path, head: Cluster, at_checkpoint: Callable[[int, Callable[[], object]], None]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    settings = ["train.keep_checkpoints=3"]
    run_dir = run_dir_of(recipe, *settings)
    at_checkpoint(9, interrupt)
    cut = head.train(recipe, *settings)
    assert (cut.code, "interrupted" in cut.err) == (130, True)
    whole, *newer = complete(run_dir)
    assert [path.name for path in (whole, *newer)] == [f"step-{step:08d}" for step in (3, 6, 9)]
    for path in newer:
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)

    since = time.time()
    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    for path in newer:
        assert f"{path / 'model.safetensors'}: damaged" in done.err
    assert "goes on from the checkpoint before" in done.err
    assert starts(run_dir) == [0, 3]
    # MLflow knew steps up to 6
    assert_as_unbroken(run_dir, unbroken, repeated=True)
    seconds = seconds_until_step_goes_on(run_dir, since)
    note("newest checkpoints damaged", seconds=seconds, lost=0, difference=0.0)
