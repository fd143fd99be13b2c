"""MLflow's server down at any moment of a run, without the run: a real server, killed and started again.

One of them with a run: `tests/e2e/test_faults_stores.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.tracking import mlflow_store
from mpformer.tracking.mlflow import Link
from mpformer.tracking.tracker import sync
from mpformer.types import RunError
from tests.servers import MlflowServer
from tests.tracking.test_tracker import begin, in_mlflow, in_record, log_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests, each of which starts it where it needs it."""
    mlflow = MlflowServer(tmp_path_factory.mktemp("server"))
    yield mlflow
    mlflow.kill()


def problem(folder: Path) -> str | None:
    link = Link.read(folder / "run")
    assert link is not None
    return link.problem


def assert_all_there(server: MlflowServer, folder: Path) -> None:
    """MLflow has every point of the record once, and the run as finished."""
    link = Link.read(folder / "run")
    assert link is not None
    assert link.run_id is not None
    assert in_mlflow(server.folder, link.run_id) == in_record(folder)
    assert set(in_record(folder).values()) == {1}
    assert mlflow_store.client(server.uri).get_run(link.run_id).info.status == "FINISHED"
    assert link.problem is None


def test_down_from_the_start_to_the_end(server: MlflowServer, tmp_path: Path) -> None:
    server.kill()
    tracker = begin(tmp_path, uri=server.uri)
    log_steps(tracker, 0, 5)
    tracker.commit(5)
    log_steps(tracker, 6, 9)
    tracker.finish()
    assert tracker.mlflow_run_id is None
    with pytest.raises(RunError, match=server.uri):
        sync(tmp_path / "run")
    server.start()
    for _ in range(2):  # a second time changes nothing
        sync(tmp_path / "run")
        assert_all_there(server, tmp_path)


def test_killed_in_the_middle(server: MlflowServer, tmp_path: Path) -> None:
    server.start()
    tracker = begin(tmp_path, uri=server.uri)
    log_steps(tracker, 0, 5)
    tracker.commit(5)
    server.kill()
    log_steps(tracker, 6, 9)
    tracker.commit(9)
    log_steps(tracker, 10, 12)
    tracker.finish()
    assert problem(tmp_path)
    server.start()
    assert {step for _, step in in_mlflow(server.folder, tracker.mlflow_run_id)} == set(range(6))
    sync(tmp_path / "run")
    assert_all_there(server, tmp_path)


def test_killed_and_back_before_the_end(server: MlflowServer, tmp_path: Path) -> None:
    server.start()
    tracker = begin(tmp_path, uri=server.uri)
    log_steps(tracker, 0, 5)
    server.kill()
    tracker.commit(5)
    assert problem(tmp_path)
    server.start()
    log_steps(tracker, 6, 9)
    tracker.finish()
    assert_all_there(server, tmp_path)


def test_killed_before_the_pictures(server: MlflowServer, tmp_path: Path) -> None:
    """All points are there; what is left are the pictures, one call each, and the end of the run."""
    server.start()
    tracker = begin(tmp_path, uri=server.uri)
    log_steps(tracker, 0, 5)
    tracker.commit(5)
    pictures = tmp_path / "run" / "pictures"
    pictures.mkdir()
    names = {f"{number}.png" for number in range(6)}
    for name in names:
        (pictures / name).write_bytes(b"\x89PNG")
    server.kill()
    tracker.finish()
    assert problem(tmp_path)
    server.start()
    sync(tmp_path / "run")
    assert_all_there(server, tmp_path)
    sent = mlflow_store.client(server.uri).list_artifacts(tracker.mlflow_run_id, "pictures")
    assert {Path(item.path).name for item in sent} == names
