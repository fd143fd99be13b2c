"""Feeding one tracker from a run's record.

Points go to a tracker when a checkpoint that covers them is committed, the values of each metric key in the
order of their steps. What a tracker holds of a key is therefore always a beginning of the record, and its
latest step of each key says where to continue: after a kill at any moment no point is missing or double. A
tracker that fails never stops a run: the reason is noted in the run's folder and it is tried again later, at
the latest by `mpformer sync`.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from mpformer import atomic
from mpformer.shell import command
from mpformer.tracking.mlflow_store import first_line
from mpformer.tracking.record import Point, merge_steps, read_points
from mpformer.types import RunError

log = logging.getLogger(__name__)

LONGEST_SHARE_WAITING = 0.02
"""Largest share of wall time that attempts to reach a dead tracker may take."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A file in the run's folder: how much of the record a tracker may have."""

    committed_step: int = 0
    """Points up to this step are covered by a checkpoint, or the run has ended: they may be sent."""
    status: str = "RUNNING"
    """RUNNING, FINISHED, FAILED or KILLED."""
    problem: str | None = None
    """Why the last attempt failed."""

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The note in a file; None without one. Raises `RunError` for a damaged one."""
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path}: damaged ({error}): delete it to continue without; the record is complete, and a "
                "resumed run sends all of it to the tracker as a new run"
            ) from None

    def save(self, path: Path) -> None:
        try:
            atomic.write_text(path, json.dumps(asdict(self), indent=1))
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error


_Note = TypeVar("_Note", bound=Note)


class Feed(ABC, Generic[_Note]):
    """Brings one tracker up to date with the committed part of a run's record."""

    def __init__(self, run_dir: Path, path: Path, note: _Note) -> None:
        self.run_dir = run_dir
        self.note = note
        self._path = path
        self._held: dict[str, int] | None = None
        """Latest step of each key in the tracker; None until it was opened, and again after a failure."""
        self._pending: list[Point] = []
        """Points that the tracker may lack; read from the record whenever it is opened."""
        self._not_before = 0.0
        note.save(path)

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call the tracker."""

    @property
    def place(self) -> str:
        """Where the run is found in the tracker, for messages."""
        return self.name

    @abstractmethod
    def failures(self) -> tuple[type[Exception], ...]:
        """Exceptions that mean that the tracker cannot be reached."""

    @abstractmethod
    def _open(self) -> Mapping[str, int]:
        """Connect; the latest step that the tracker holds of each key."""

    @abstractmethod
    def _send(self, points: Sequence[Point]) -> None:
        """Send points that the tracker lacks, steps ascending."""

    @abstractmethod
    def _close(self, status: str) -> None:
        """The run has ended and all points were sent."""

    def add(self, point: Point) -> None:
        """A point that was just recorded."""
        if self._held is not None:
            self._pending.append(point)

    def advance(self, **changes: Any) -> None:
        """Change the note."""
        self.note = replace(self.note, **changes)
        self.note.save(self._path)

    def attempt(self, at_once: bool = False) -> bool:
        """Send all committed points that the tracker lacks; False, and the reason noted, where it fails."""
        if not at_once and time.monotonic() < self._not_before:
            return False
        began = time.monotonic()
        try:
            self._bring_up_to_date()
            if self.note.status != "RUNNING":
                self._close(self.note.status)
        except self.failures() as error:
            reason = first_line(error)
            if self.note.problem is None:
                message = "%s: %s. The run goes on; later: %s"
                log.warning(message, self.name, reason, command("sync", self.run_dir))
            self._held = None  # part of a batch may have arrived: ask the tracker next time
            now = time.monotonic()
            self._not_before = now + (now - began) / LONGEST_SHARE_WAITING
            self.advance(problem=reason)
            return False
        if self.note.problem is not None:
            self.advance(problem=None)
        return True

    def _bring_up_to_date(self) -> None:
        if self._held is None:
            held = dict(self._open())
            self._pending = read_points(self.run_dir)
            self._held = held
        committed = self.note.committed_step
        due = _lacking(merge_steps(p for p in self._pending if p.step <= committed), self._held)
        if due:
            self._send(due)
            self._held.update({key: point.step for point in due for key in point.values})
            self._acknowledge(self._held)
        self._pending = [point for point in self._pending if point.step > committed]

    def _acknowledge(self, held: Mapping[str, int]) -> None:
        """Points were sent; `held`: the latest step of each key."""


def _lacking(points: Sequence[Point], held: Mapping[str, int]) -> list[Point]:
    """What a tracker lacks of points, given the latest step that it holds of each key."""
    new = [
        replace(point, values={k: v for k, v in point.values.items() if point.step > held.get(k, -1)})
        for point in points
    ]
    return [point for point in new if point.values]
