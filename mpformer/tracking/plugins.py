"""Trackers from outside the package, named in `tracking.also` (see docs/extending.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mpformer import plugin
from mpformer.config import Config
from mpformer.tracking.entry import Entry
from mpformer.tracking.feed import Feed, Note
from mpformer.tracking.record import Point
from mpformer.tracking.run_dir import RunDir
from mpformer.types import RunError


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it."""

    run_dir: Path
    name: str
    """Recipe or row name and seed: 'tiny-s0'."""
    experiment: str
    """The name of its study, or of its recipe."""
    parameters: Mapping[str, str]
    """Settings in which it differs from the defaults, or from the base of its study."""
    tags: Mapping[str, str]


class TrackerPlugin(Protocol):
    """A tracker. It is made with the plug-in's options, and called from rank 0 only.

    Its attribute `failures` may name the exceptions that mean that it cannot be reached, a tuple of classes;
    without it, `OSError`. They never stop a run: the points are sent later, after another call of `open`.
    Any other exception ends the run as an error of the plug-in.
    """

    def open(self, run: TrackedRun, sent: Mapping[str, int]) -> Mapping[str, int]:
        """Begin a run or go on with it; the latest step that the tracker holds of each metric key.

        sent: the latest step of each key that was sent before, as the run's folder has it: a `send` that a
        kill interrupted is missing there. A tracker that can be asked returns what it holds; one that begins
        anew returns {} and gets every point again; one that can do neither returns `sent`.
        """

    def send(self, points: Sequence[Point]) -> None:
        """Take points that it lacks, steps ascending. Non-finite values are NaN."""

    def close(self, status: str) -> None:
        """The run has ended as FINISHED, FAILED or KILLED. A resumed run calls `open` again."""


@dataclass(frozen=True, kw_only=True)
class PluginNote(Note):
    """`RUN/trackers/NAME.json`: a tracker's plug-in, its run, and how far it has got."""

    kind: str
    options: dict[str, Any]
    name: str
    experiment: str
    parameters: dict[str, str]
    tags: dict[str, str]
    sent: dict[str, int] = field(default_factory=dict)
    """Latest step of each metric key that was sent."""


class PluginFeed(Feed[PluginNote]):
    """Feeds a tracker from outside. Raises `InputError` for a plug-in that is no tracker."""

    def __init__(self, run_dir: Path, path: Path, note: PluginNote) -> None:
        self._tracker = plugin.build(note.kind, note.options, TrackerPlugin, "tracking.also")
        super().__init__(run_dir, path, note)

    @property
    def name(self) -> str:
        return self.note.kind

    def failures(self) -> tuple[type[Exception], ...]:
        return getattr(self._tracker, "failures", (OSError,))

    def _open(self) -> Mapping[str, int]:
        note = self.note
        run = TrackedRun(self.run_dir, note.name, note.experiment, note.parameters, note.tags)
        held = self._call("open", run, note.sent)
        if not isinstance(held, Mapping):
            raise RunError(f"tracking.also: {note.kind}: open: steps by metric key expected, not {held!r}")
        return held

    def _send(self, points: Sequence[Point]) -> None:
        self._call("send", points)

    def _close(self, status: str) -> None:
        self._call("close", status)

    def _acknowledge(self, held: Mapping[str, int]) -> None:
        self.advance(sent=dict(held))

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method of the plug-in; an exception that it does not name is its own error, and says so."""
        try:
            return getattr(self._tracker, method)(*arguments)
        except self.failures():
            raise
        except Exception as error:  # the tracker's own code may raise anything
            text = f"tracking.also: {self.note.kind}: {method}: {plugin.described(error)}"
            raise RunError(text) from error


def new_feeds(run_dir: Path, config: Config, entry: Entry, start_step: int, name: str) -> list[PluginFeed]:
    """The feeds of the trackers in `tracking.also`, for a run that begins or goes on at `start_step`."""
    feeds = []
    for number, tracker in enumerate(config.tracking.also):
        kinds = [other.kind for other in config.tracking.also[:number]]
        copy = kinds.count(tracker.kind)
        path = RunDir(run_dir).tracker(tracker.kind.replace(":", ".") + (f"-{copy + 1}" if copy else ""))
        known = PluginNote.load(path)
        note = PluginNote(
            kind=tracker.kind,
            options=tracker.options,
            name=name,
            experiment=entry.experiment,
            parameters=entry.parameters(config),
            tags=entry.all_tags(config),
            sent=known.sent if known else {},
            committed_step=start_step,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        feeds.append(PluginFeed(run_dir, path, note))
    return feeds


def known_notes(run_dir: Path) -> list[tuple[Path, PluginNote]]:
    """Those that earlier starts of a run have left, with their files."""
    notes = ((path, PluginNote.load(path)) for path in sorted(RunDir(run_dir).trackers.glob("*.json")))
    return [(path, note) for path, note in notes if note is not None]
