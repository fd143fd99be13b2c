"""MLflow and a bucket that go away at any moment of a run and come back: nothing is lost, nothing double."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.model.weights import checkpoints
from mpformer.tracking.tracker import Link, client
from tests.e2e.conftest import run, start
from tests.e2e.faults import (
    assert_as_unbroken,
    at_step,
    held,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    training_workers,
    values,
    wait_for,
)
from tests.servers import MlflowServer, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def seconds_waited(run_dir: Path, unbroken: Path) -> float:
    """How much longer than in the unbroken run the training stood at its checkpoints."""
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, unbroken))
    return mine["timers_seconds"]["checkpoint"] - theirs["timers_seconds"]["checkpoint"]


# --- MLflow ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all runs; the first finds it down."""
    mlflow = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield mlflow
    mlflow.kill()


def assert_sync_brings_the_rest(run_dir: Path, out: str, unbroken: Path, server: MlflowServer) -> None:
    """The run has said when it happened, and at its end, what MLflow lacks; its record lacks nothing."""
    told = [line for line in out.splitlines() if "mpformer sync" in line]
    assert len(told) == 2
    assert "The run goes on" in told[0]
    assert told[1].startswith("MLflow lacks a part of this run (")
    assert told[1].endswith(f"mpformer sync {run_dir}")
    assert values(run_dir) == values(unbroken)
    server.start()
    synced = run("sync", run_dir)
    assert synced.returncode == 0, synced.stderr
    assert_as_unbroken(run_dir, unbroken)


def test_mlflow_is_down_from_the_start(recipe: Path, unbroken: Path, server: MlflowServer) -> None:
    settings = [f"tracking.mlflow={server.uri}"]
    done = run("train", recipe, *settings)
    assert done.returncode == 0, done.stderr
    run_dir = run_dir_of(recipe, *settings)
    assert Link.read(run_dir).run_id is None
    down = run("sync", run_dir)
    assert (down.returncode, down.stderr.count("\n")) == (1, 1)
    assert server.uri in down.stderr
    assert_sync_brings_the_rest(run_dir, done.stdout, unbroken, server)
    waited = seconds_waited(run_dir, unbroken)
    note("MLflow's server down from the start; sync", waited=waited, lost=0, difference=0.0)


def test_mlflow_is_killed_in_the_middle_of_a_run(recipe: Path, unbroken: Path, server: MlflowServer) -> None:
    settings = [f"tracking.mlflow={server.uri}"]
    run_dir = run_dir_of(recipe, *settings)
    process = start("train", recipe, *settings)
    wait_for(at_step(run_dir, 3), process)
    with held(process):
        server.kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_sync_brings_the_rest(run_dir, out, unbroken, server)
    assert run("sync", run_dir).returncode == 0
    assert_as_unbroken(run_dir, unbroken)  # a second time changes nothing
    waited = seconds_waited(run_dir, unbroken)
    note("MLflow's server killed while the run trains; sync", waited=waited, lost=0, difference=0.0)


def test_mlflow_is_killed_and_comes_back_while_the_run_goes_on(
    recipe: Path, unbroken: Path, server: MlflowServer
) -> None:
    settings = [f"tracking.mlflow={server.uri}"]
    run_dir = run_dir_of(recipe, *settings)
    process = start("train", recipe, *settings)
    wait_for(at_step(run_dir, 3), process)
    with held(process):
        server.kill()
    wait_for(lambda: Link.read(run_dir).problem, process)
    with held(process):
        server.start()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "The run goes on" in out
    assert "MLflow lacks" not in out
    assert_as_unbroken(run_dir, unbroken)
    waited = seconds_waited(run_dir, unbroken)
    note("MLflow's server killed and started again during the run", waited=waited, lost=0, difference=0.0)


def test_mlflow_is_killed_at_the_end_of_a_run(recipe: Path, unbroken: Path, server: MlflowServer) -> None:
    settings = [f"tracking.mlflow={server.uri}", "evaluate.pictures=5"]
    run_dir = run_dir_of(recipe, *settings)
    process = start("train", recipe, *settings)
    # what is left then: the pictures, one call each, and the good-bye
    wait_for((run_dir / "summary.json").exists, process, pause=0.002)
    server.kill()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_sync_brings_the_rest(run_dir, out, unbroken, server)
    store, run_id = client(server.uri), Link.read(run_dir).run_id
    pictures = {path.name for path in (run_dir / "pictures").iterdir() if path.is_file()}
    assert len(pictures) > 5
    assert pictures <= {Path(item.path).name for item in store.list_artifacts(run_id, "pictures")}
    waited = seconds_waited(run_dir, unbroken)
    note("MLflow's server killed at the end of the run; sync", waited=waited, lost=0, difference=0.0)


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
    assert len(checkpoints.complete(run_dir)) == 2
    assert bucket.content(run_dir.name) == mine


def test_a_bucket_closed_for_a_minute_gets_everything(recipe: Path, unbroken: Path, bucket: S3Server) -> None:
    settings = [f"cluster.mirror={bucket.uri}"]
    run_dir = run_dir_of(recipe, *settings)
    process = start("train", recipe, *settings)
    wait_for(at_step(run_dir, 3), process)
    with held(process):
        bucket.close()
        closed = time.monotonic()
    # the run is over by then, and waits
    wait_for(lambda: time.monotonic() > closed + 60 and (run_dir / "summary.json").exists(), process)
    bucket.open()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "The next checkpoint tries again" in out
    assert "Trying again in 1 s" in out
    assert_as_unbroken(run_dir, unbroken)
    assert_mirror_equals(bucket, run_dir)
    waited = seconds_waited(run_dir, unbroken)
    note("bucket closed for 60 s, beyond the last step", waited=waited, lost=0, difference=0.0)


def test_a_bucket_catches_up_and_another_machine_goes_on_from_it(
    recipe: Path, unbroken: Path, bucket: S3Server, tmp_path: Path
) -> None:
    settings = [f"cluster.mirror={bucket.uri}"]
    run_dir = run_dir_of(recipe, *settings)
    process = start("train", recipe, *settings)
    wait_for(at_step(run_dir, 3), process)
    with held(process):
        bucket.overloaded = True
    wait_for(lambda: at_step(run_dir, 6)() and bucket.refused, process)
    with held(process):
        bucket.overloaded = False
    # the checkpoint after that brings what the one before could not
    last = f"{run_dir.name}/checkpoints/step-00000009/state.json"
    wait_for(lambda: bucket.has(last), process)
    (worker,) = training_workers(process.pid)
    worker.suspend()
    process.kill()
    worker.kill()
    process.communicate()
    assert not (run_dir / "summary.json").exists()

    elsewhere = [*settings, f"storage={tmp_path / 'another machine'}"]
    there = run_dir_of(recipe, *elsewhere)
    resumed = start("train", recipe, *elsewhere)
    seconds = seconds_until_step_goes_on(there, resumed, time.time(), before=run_dir)
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    started = json.loads(sorted((there / "metrics").glob("*.jsonl"))[-1].read_text().splitlines()[0])
    assert started["start_step"] == 9
    assert_as_unbroken(there, unbroken)
    assert_mirror_equals(bucket, there)
    note("bucket answers 503; its copy resumed on another machine", seconds=seconds, lost=0, difference=0.0)
