"""The copy of a run on other file systems: a folder, and a real S3 protocol served on this machine."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from pyarrow import fs

from mpformer.config.run import Keep
from mpformer.model.weights import checkpoints
from mpformer.tracking.record import RecordWriter
from mpformer.train import mirror
from mpformer.train.mirror import Mirror
from mpformer.types import InputError, RunError
from tests.servers import S3Server


@pytest.fixture(scope="module")
def s3():
    """The URI of a bucket, and the environment that opens it."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in server.environment.items():
            patch.setenv(key, value)
        yield server.uri
    server.close()


@pytest.fixture(params=["folder", "s3"])
def uri(request, tmp_path):
    return str(tmp_path / "copy") if request.param == "folder" else request.getfixturevalue("s3")


def write(run_dir: Path, step: int) -> None:
    """What a run leaves: a checkpoint, a longer record, settings."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / checkpoints.STATE_FILE).write_text(json.dumps({"step": step}))
    for old in checkpoints.complete(run_dir)[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    (run_dir / "metrics").mkdir(exist_ok=True)
    with (run_dir / "metrics" / "0001.jsonl").open("a") as file:
        file.write(f"{step}\n")
    (run_dir / "config.yaml").write_text("name: run\n")
    (run_dir / "data.json").write_text("{}")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_machine_fetches_what_was_copied(uri, tmp_path, request):
    here, there = tmp_path / "here" / request.node.name, tmp_path / "there" / request.node.name
    first, other = Mirror(uri, here), Mirror(uri, there)
    other.pull()  # nothing was copied yet
    assert not there.exists()
    for step in (1, 2, 3):
        write(here, step)
        assert first.push()
    other.pull()
    assert checkpoints.complete(there) == [there / "checkpoints" / "step-00000003"]
    assert all(content(here)[name] == data for name, data in content(there).items())

    (here / "summary.json").write_text("{}")
    first.finish()
    other.pull()
    assert (there / "summary.json").read_text() == "{}"
    kept = {Path(name).parent.name for name in other._there() if name.endswith("state.json")}
    assert kept == {"step-00000002", "step-00000003"}


def test_the_best_checkpoint_is_fetched_and_stays(uri, tmp_path, request):
    """Kept here, it lies between older ones that are gone; elsewhere it is still the best."""
    here, there = tmp_path / "here" / request.node.name, tmp_path / "there" / request.node.name
    copy = Mirror(uri, here, "val/AP")

    def train(run_dir: Path, step: int, value: float) -> None:
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / checkpoints.STATE_FILE).write_text(json.dumps({"step": step}))
        RecordWriter(run_dir, step - 1).add(step, {"val/AP": value})
        for old in checkpoints.superseded(run_dir, Keep(best="val/AP", last=1)):
            shutil.rmtree(old)

    for step, value in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 25.0)):
        train(here, step, value)
        assert copy.push()
    other = Mirror(uri, there, "val/AP")
    kept = {"step-00000002", "step-00000004"}
    assert {Path(name).parent.name for name in other._there() if name.endswith("state.json")} == kept
    other.pull()
    assert {path.name for path in checkpoints.complete(there)} == kept
    train(there, 5, 27.0)
    assert other.push()
    kept = {"step-00000002", "step-00000005"}
    assert {Path(name).parent.name for name in other._there() if name.endswith("state.json")} == kept


def test_a_folder_that_is_ahead_is_not_set_back(uri, tmp_path, request):
    run_dir = tmp_path / request.node.name
    copy = Mirror(uri, run_dir)
    write(run_dir, 1)
    copy.push()
    write(run_dir, 2)
    before = content(run_dir)
    copy.pull()
    assert content(run_dir) == before


def test_weights_that_wait_for_their_evaluation_are_fetched_and_those_measured_are_gone(
    uri, tmp_path, request
):
    here, there = tmp_path / "here" / request.node.name, tmp_path / "there" / request.node.name
    copy = Mirror(uri, here)
    waiting = here / "evaluations"
    for step in (1, 2):
        write(here, step)
        waiting.mkdir(exist_ok=True)
        (waiting / f"step-{step:08d}.safetensors").write_bytes(bytes([step]))
        assert copy.push()
    (waiting / "step-00000001.safetensors").unlink()
    assert copy.push()
    Mirror(uri, there).pull()
    found = {path.name: path.read_bytes() for path in (there / "evaluations").iterdir()}
    assert found == {"step-00000002.safetensors": b"\2"}


def test_a_checkpoint_that_was_torn_on_its_way_is_not_fetched(uri, tmp_path, request, monkeypatch):
    here, there = tmp_path / "here" / request.node.name, tmp_path / "there" / request.node.name
    copy = Mirror(uri, here)
    write(here, 1)
    copy.push()
    write(here, 2)
    sends = itertools.count()
    send = Mirror._send

    def torn(self, path):
        if path.name == checkpoints.STATE_FILE and next(sends) == 1:
            raise OSError("Connection refused")
        send(self, path)

    monkeypatch.setattr(Mirror, "_send", torn)
    assert not copy.push()
    Mirror(uri, there).pull()
    assert [path.name for path in checkpoints.complete(there)] == ["step-00000001"]
    assert copy.push()
    Mirror(uri, there).pull()
    assert [path.name for path in checkpoints.complete(there)][-1] == "step-00000002"


def test_a_store_that_refuses_is_waited_for_and_then_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    copy = Mirror(str(tmp_path / "file"), tmp_path / "run")  # a file where a folder should be
    write(tmp_path / "run", 1)
    waited = []
    monkeypatch.setattr(mirror.time, "sleep", waited.append)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 5.0)
    monkeypatch.setattr(mirror.time, "monotonic", lambda: sum(waited))
    with pytest.raises(RunError, match="the run is complete in"):
        copy.finish()
    assert waited == [1.0, 2.0]


def test_a_uri_that_nothing_opens(tmp_path):
    with pytest.raises(InputError, match=r"cluster\.mirror: nowhere://x/run"):
        Mirror("nowhere://x", tmp_path / "run")


def test_a_store_that_cannot_be_asked_where_it_lies_is_waited_for(tmp_path, monkeypatch):
    """Amazon's buckets are asked for their region when they are opened; a run must not end of that."""
    write(tmp_path / "run", 1)
    refusals = [OSError("When resolving region: Could not resolve hostname")] * 2

    class Buckets:
        @staticmethod
        def from_uri(uri):
            if refusals:
                raise refusals.pop()
            return fs.LocalFileSystem(), str(tmp_path / "copy")

    monkeypatch.setattr(mirror.fs, "FileSystem", Buckets)
    waited = []
    monkeypatch.setattr(mirror.time, "sleep", waited.append)
    assert Mirror("s3://results", tmp_path / "run").push()
    assert waited == [1.0, 2.0]
    assert content(tmp_path / "copy" / "run") == content(tmp_path / "run")
