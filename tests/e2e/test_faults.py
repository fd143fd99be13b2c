"""Faults of one machine, with real processes: after each the run is what it would have been without."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mpformer.model.weights import checkpoints
from tests.e2e.conftest import run, start
from tests.e2e.faults import (
    assert_as_unbroken,
    at_step,
    difference,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    training_workers,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_worker_is_replaced(recipe: Path, unbroken: Path) -> None:
    run_dir = run_dir_of(recipe)
    process = start("train", recipe)
    wait_for(at_step(run_dir, 3), process)
    workers = training_workers(process.pid)
    assert len(workers) == 1
    workers[0].kill()
    seconds = seconds_until_step_goes_on(run_dir, process, time.time())
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_as_unbroken(run_dir, unbroken)
    note("worker killed (kill -9)", seconds=seconds, lost=0, difference=difference(run_dir, unbroken))


def test_a_second_driver_refuses_and_a_damaged_checkpoint_is_passed_over(
    recipe: Path, unbroken: Path
) -> None:
    """One run through three faults: a second driver beside it, its driver killed, its checkpoint damaged."""
    run_dir = run_dir_of(recipe)
    process = start("train", recipe)
    wait_for(at_step(run_dir, 6), process)
    (worker,) = training_workers(process.pid)
    worker.suspend()  # it would be done before the second driver has waited for the first
    second = run("train", recipe, timeout=120)
    assert second.returncode == 1
    assert "another process is at work on this run" in second.stderr
    note("two drivers for one run: the second refuses", seconds=None, lost=0, difference=0.0)

    process.kill()
    worker.kill()
    process.communicate()
    assert len(checkpoints.complete(run_dir)) == 2
    newest = checkpoints.complete(run_dir)[-1] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)

    resumed = start("train", recipe)
    seconds = seconds_until_step_goes_on(run_dir, resumed, time.time())
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    assert f"{newest}: damaged" in err
    assert "goes on from the checkpoint before" in err
    assert_as_unbroken(run_dir, unbroken, repeated=True)
    note("driver killed, newest checkpoint damaged", seconds=seconds, lost=0, difference=0.0)
