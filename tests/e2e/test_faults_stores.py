"""MLflow and a bucket that go away during a run and come back: nothing is lost, nothing double.

The other moments, without training: tests/tracking/test_outages.py, tests/train/test_mirror_outages.py.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpformer.model.weights.checkpoints import complete
from mpformer.tracking.mlflow import Link
from tests.e2e.conftest import Cluster
from tests.e2e.faults import (
    assert_as_unbroken,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    starts,
    values,
)
from tests.servers import MlflowServer, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AtCheckpoint = Callable[[int, Callable[[], object]], None]


def seconds_waited(run_dir: Path, unbroken: Path) -> float:
    """How much longer than in the unbroken run the training stood at its checkpoints."""
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, unbroken))
    return mine["timers_seconds"]["checkpoint"] - theirs["timers_seconds"]["checkpoint"]


# --- MLflow ---------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    mlflow = MlflowServer(tmp_path)
    mlflow.start()
    yield mlflow
    mlflow.kill()


def test_mlflow_is_killed_in_the_middle_of_a_run(
    recipe: Path, unbroken: Path, head: Cluster, server: MlflowServer, at_checkpoint: AtCheckpoint
) -> None:
    settings = [f"tracking.mlflow={server.uri}"]
    run_dir = run_dir_of(recipe, *settings)
    at_checkpoint(6, server.kill)
    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    # it has said when it happened, and at its end, what MLflow lacks; its record lacks nothing
    told = [line for line in done.out.splitlines() if "mpformer sync" in line]
    assert len(told) == 2
    assert "The run goes on" in told[0]
    assert told[1].startswith("MLflow lacks a part of this run (")
    assert told[1].endswith(f"mpformer sync {run_dir}")
    assert values(run_dir) == values(unbroken)
    down = head.command("sync", run_dir)
    assert (down.code, down.err.count("\n")) == (1, 1)
    assert server.uri in down.err

    server.start()
    for _ in range(2):  # a second time changes nothing
        synced = head.command("sync", run_dir)
        assert synced.code == 0, synced.err
        assert_as_unbroken(run_dir, unbroken)
    assert Link.read(run_dir).problem is None
    waited = seconds_waited(run_dir, unbroken)
    note("MLflow's server killed while the run trains; sync", waited=waited, lost=0, difference=0.0)


# --- object storage -------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    yield server
    server.close()


def assert_mirror_equals(bucket: S3Server, run_dir: Path) -> None:
    """All of the run's own files, and nothing else; Ray's and those of one machine are not mirrored."""
    local = ("ray", ".lock", "progress.json", "warnings.log")
    mine = {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.relative_to(run_dir).parts[0] not in local
    }
    assert len(complete(run_dir)) == 2
    assert bucket.content(run_dir.name) == mine


def test_a_bucket_catches_up_and_another_machine_goes_on_from_it(
    recipe: Path, unbroken: Path, bucket: S3Server, head: Cluster, at_checkpoint: AtCheckpoint, tmp_path: Path
) -> None:
    settings = [f"cluster.mirror={bucket.uri}"]
    run_dir = run_dir_of(recipe, *settings)

    def refuse() -> None:
        bucket.overloaded = True

    def accept() -> None:
        bucket.overloaded = False

    def lose_the_machine() -> None:
        # the checkpoint of step 9 has brought what that of step 6 could not; this one never gets there
        assert bucket.refused
        assert bucket.has(f"{run_dir.name}/checkpoints/step-00000009/state.json")
        raise KeyboardInterrupt

    at_checkpoint(6, refuse)
    at_checkpoint(9, accept)
    at_checkpoint(12, lose_the_machine)
    lost = head.train(recipe, *settings)
    assert (lost.code, "interrupted" in lost.err) == (130, True)
    assert "The next checkpoint tries again" in lost.out
    assert not (run_dir / "summary.json").exists()

    elsewhere = [*settings, f"storage={tmp_path / 'another machine'}"]
    there = run_dir_of(recipe, *elsewhere)
    since = time.time()
    with contextlib.ExitStack() as until_the_end:
        # closed at the last checkpoint: the run is over by then, and waits for it
        at_checkpoint(12, lambda: until_the_end.enter_context(bucket.closed_until_waited_for()))
        done = head.train(recipe, *elsewhere)
    assert done.code == 0, done.err
    assert "Trying again in 1 s" in done.out
    assert starts(there)[-1] == 9
    assert_as_unbroken(there, unbroken)
    assert_mirror_equals(bucket, there)
    seconds = seconds_until_step_goes_on(there, since)
    note("bucket answers 503; its copy resumed on another machine", seconds=seconds, lost=0, difference=0.0)
