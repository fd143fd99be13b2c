"""Trackers from outside the package: fed from the record, each point once, whatever dies."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from tensorboardX.proto.event_pb2 import Event

from mpformer.config import Config, config_hash
from mpformer.tracking.entry import Entry
from mpformer.tracking.plugins import TrackedRun
from mpformer.tracking.record import Point, read_metrics
from mpformer.tracking.tracker import Tracker, close_run, problems, sync
from mpformer.types import InputError, RunError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Remote:
    """A tracker that can be asked what it holds, like a server, which outlives the runs."""

    held: ClassVar[list[tuple[str, int, float]]] = []
    calls: ClassVar[list[str]] = []
    down = False

    def open(self, run: TrackedRun, sent: Mapping[str, int]) -> Mapping[str, int]:
        self._reach(f"open {run.name}")
        latest: dict[str, int] = {}
        for key, step, _ in self.held:
            latest[key] = max(step, latest.get(key, -1))
        return latest

    def send(self, points: Sequence[Point]) -> None:
        self._reach("send")
        self.held.extend((key, point.step, v) for point in points for key, v in point.values.items())

    def close(self, status: str) -> None:
        self._reach(f"close {status}")

    def _reach(self, call: str) -> None:
        if type(self).down:
            raise ConnectionError("Connection refused")
        self.calls.append(call)


class Blind(Remote):
    """A tracker that cannot be asked: what the run's folder has noted is all there is."""

    def open(self, run: TrackedRun, sent: Mapping[str, int]) -> Mapping[str, int]:
        return sent


class Broken(Blind):
    def send(self, points: Sequence[Point]) -> None:
        raise KeyError("loss")


@pytest.fixture(autouse=True)
def _fresh():
    Remote.held, Remote.calls, Remote.down = [], [], False


def begin(storage: Path, *also: object, start_step: int = 0) -> Tracker:
    config = Config.model_validate({"name": "tiny", "tracking": {"mlflow": None, "also": also}})
    return Tracker.open(
        storage / "run",
        config,
        start_step=start_step,
        entry=Entry("study"),
        mlflow_uri=None,
        run_name="tiny-s0",
    )


def kind(tracker: type) -> str:
    return f"{__name__}:{tracker.__name__}"


def sent() -> Counter:
    return Counter((key, step) for key, step, _ in Remote.held)


def recorded(storage: Path) -> Counter:
    return Counter((key, step) for step, values in read_metrics(storage / "run") for key in values)


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"train/loss": 1.0 / (step + 1), "train/lr": 0.1})


@pytest.mark.parametrize("tracker", [Remote, Blind])
def test_points_are_sent_once_when_a_checkpoint_covers_them(tmp_path, tracker):
    first = begin(tmp_path, kind(tracker))
    log_steps(first, 1, 6)
    assert sent() == Counter()
    first.commit(4)
    assert {step for _, step in sent()} == {1, 2, 3, 4}
    log_steps(first, 7, 8)  # then it is killed, and goes on from its checkpoint
    again = begin(tmp_path, kind(tracker), start_step=4)
    log_steps(again, 5, 6)
    again.log(2, {"val/AP": 40.0})  # of an evaluation in the background, later than its step
    again.commit(6)
    again.finish()
    assert sent() == recorded(tmp_path)
    assert set(sent().values()) == {1}


@pytest.mark.parametrize("tracker", [Remote, Blind])
def test_a_dead_tracker_loses_nothing(tmp_path, tracker, caplog):
    run = begin(tmp_path, kind(tracker))
    Remote.down = True
    log_steps(run, 1, 4)
    run.commit(4)
    assert "Connection refused. The run goes on" in caplog.text
    run.finish()
    assert sent() == Counter()
    assert problems(tmp_path / "run")[0].startswith(f"{kind(tracker)} lacks a part")
    with pytest.raises(RunError, match="Connection refused"):
        sync(tmp_path / "run")
    Remote.down = False
    for _ in range(2):
        assert sync(tmp_path / "run") == f"{kind(tracker)} has the record up to step 4"
    assert sent() == recorded(tmp_path)
    assert problems(tmp_path / "run") == []
    assert Remote.calls[-1] == "close FINISHED"


def test_a_tracker_hears_of_a_run_whose_process_is_gone(tmp_path):
    run = begin(tmp_path, kind(Remote))
    log_steps(run, 1, 4)
    run.commit(2)
    close_run(tmp_path / "run", "KILLED")
    assert Remote.calls[-1] == "close KILLED"
    assert {step for _, step in sent()} == {1, 2}


def test_an_error_of_the_plug_in_itself_is_named(tmp_path):
    run = begin(tmp_path, kind(Broken))
    log_steps(run, 1, 2)
    with pytest.raises(RunError, match=r"tracking\.also: .*:Broken: send: KeyError: 'loss'"):
        run.commit(2)


def test_two_trackers_of_one_kind_have_notes_of_their_own(tmp_path):
    run = begin(tmp_path, kind(Blind), kind(Blind))
    log_steps(run, 1, 2)
    run.finish()
    notes = sorted((tmp_path / "run" / "trackers").iterdir())
    assert len(notes) == 2
    assert all(json.loads(note.read_text())["sent"] == {"train/loss": 2, "train/lr": 2} for note in notes)
    assert set(sent().values()) == {2}


def test_what_is_no_tracker_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tracking\.also: collections:Counter lacks the method open\(run"):
        begin(tmp_path, "collections:Counter")


def test_trackers_do_not_change_what_a_run_is():
    also = Config.model_validate({"tracking": {"also": [kind(Remote)]}})
    assert config_hash(also) == config_hash(Config())


def in_events(folder: Path) -> Counter:
    """How often event files hold each (key, step), read by their format: length, check sum, event, ..."""
    found: Counter = Counter()
    for file in folder.glob("events.*"):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found.update((v.tag, event.step) for v in event.summary.value if v.HasField("simple_value"))
    return found


def test_tensorboard_holds_each_point_once_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    also = {"kind": "tensorboard_tracker:TensorBoard", "options": {"folder": str(tmp_path / "boards")}}
    first = begin(tmp_path, also)
    log_steps(first, 1, 6)
    first.commit(4)
    note = next((tmp_path / "run" / "trackers").iterdir())
    before = note.read_text()
    first.commit(6)
    note.write_text(before)  # as if killed after the points were written and before that was noted
    again = begin(tmp_path, also, start_step=6)
    log_steps(again, 7, 8)
    again.finish()
    assert in_events(tmp_path / "boards" / "study" / "tiny-s0") == recorded(tmp_path)
    shutil.rmtree(tmp_path / "boards")  # and it can be made again from the record
    sync(tmp_path / "run")
    assert in_events(tmp_path / "boards" / "study" / "tiny-s0") == recorded(tmp_path)
