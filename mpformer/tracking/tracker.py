"""Tracking of a run: its record (`mpformer.tracking.record`), and the trackers that are fed from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpformer.config import Config
from mpformer.shell import command
from mpformer.tracking.entry import Entry
from mpformer.tracking.feed import Feed, Note
from mpformer.tracking.mlflow import Link, MlflowFeed
from mpformer.tracking.plugins import PluginFeed, known_notes, new_feeds
from mpformer.tracking.record import RecordWriter, record_files
from mpformer.tracking.run_dir import RunDir
from mpformer.types import InputError, RunError

log = logging.getLogger(__name__)


class Tracker:
    """Writes the record of one run and feeds its trackers. For one process only: rank 0."""

    def __init__(self, writer: RecordWriter, feeds: Sequence[Feed[Any]], start_step: int) -> None:
        self._writer = writer
        self._feeds = feeds
        self._last_step = self._committed = start_step

    @classmethod
    def open(
        cls,
        run_dir: Path,
        config: Config,
        *,
        start_step: int,
        entry: Entry,
        mlflow_uri: str | None,
        run_name: str,
    ) -> Tracker:
        """Open the record for a run that begins, or goes on, at `start_step`.

        `mlflow_uri` comes from `prepare_store`; None: not tracked in MLflow. A run that was tracked before
        goes on as the same run there. Raises `RunError` where the record cannot be written, `InputError` for
        a bad plug-in in `tracking.also`; a tracker that cannot be reached raises nothing.
        """
        run_dir = Path(run_dir)
        writer = RecordWriter(run_dir, start_step)
        feeds: list[Feed[Any]] = []
        if mlflow_uri is not None:
            link = Link.of(run_dir, config, entry, mlflow_uri, start_step, run_name)
            feeds.append(MlflowFeed(run_dir, link))
        feeds += new_feeds(run_dir, config, entry, start_step, run_name)
        for feed in feeds:
            feed.attempt()
        return cls(writer, feeds, start_step)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return next((feed.note.run_id for feed in self._feeds if isinstance(feed, MlflowFeed)), None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record one point at once: `values` by metric key, measured after `step` optimiser steps."""
        point = self._writer.add(step, values)
        self._last_step = max(self._last_step, step)
        for feed in self._feeds:
            feed.add(point)

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is written: points up to it go to the trackers."""
        self._writer.sync()
        self._committed = step
        for feed in self._feeds:
            feed.advance(committed_step=step)
            feed.attempt()

    def finish(self, status: str = "FINISHED") -> None:
        """Close the record. FINISHED sends all remaining points; FAILED and KILLED do not: a resumed run
        measures again what no checkpoint covers."""
        self._writer.sync()
        self._writer.close()
        last = self._last_step if status == "FINISHED" else self._committed
        for feed in self._feeds:
            feed.advance(committed_step=last, status=status)
            feed.attempt(at_once=True)


def sync(run_dir: Path) -> str:
    """Bring to a run's trackers what they lack of its record; one line for each, saying what it has now.

    Points that no checkpoint covers are left out unless the run has finished: a resumed run measures them
    again. Raises `InputError` where the folder is no tracked run, `RunError` where a tracker still fails.
    """
    run_dir = Path(run_dir)
    if not record_files(run_dir):
        raise InputError(
            f"{run_dir}: no metrics record here; a run's folder is expected, for instance runs/NAME"
        )
    # a finished run whose process was killed before it could say so to its trackers
    feeds = _known_feeds(run_dir, "FINISHED" if RunDir(run_dir).finished else None)
    if not feeds:
        raise InputError(f"{run_dir}: this run was not tracked with MLflow (tracking.mlflow: null)")
    lines = []
    for feed in feeds:
        if not feed.attempt(at_once=True):
            raise RunError(f"{feed.name}: {feed.note.problem}")
        lines.append(f"{feed.place} has the record up to step {feed.note.committed_step}")
    return "\n".join(lines)


def close_run(run_dir: Path, status: str, *, only_running: bool = False) -> None:
    """Tell the trackers how a run has ended whose own process cannot do so any more: FAILED or KILLED.

    `only_running`: not the trackers that it has told of its end.
    """
    for feed in _known_feeds(Path(run_dir), status, only_running):
        try:
            feed.attempt(at_once=True)
        except RunError as error:
            log.warning("%s", error)


def problems(run_dir: Path) -> list[str]:
    """One line for each tracker that lacks a part of a run's record."""
    link = Link.read(run_dir)
    found = {"MLflow": link.problem} if link is not None else {}
    found |= {note.kind: note.problem for _, note in known_notes(run_dir)}
    return [
        f"{name} lacks a part of this run ({problem}); later: {command('sync', run_dir)}"
        for name, problem in found.items()
        if problem is not None
    ]


def _known_feeds(run_dir: Path, status: str | None, only_running: bool = False) -> list[Feed[Any]]:
    """The feeds that earlier starts of a run have left; `status`: that of the run, if it has changed."""

    def chosen(note: Note) -> bool:
        return note.status == "RUNNING" or not only_running

    feeds: list[Feed[Any]] = []
    if (link := Link.read(run_dir)) is not None and chosen(link):
        feeds.append(MlflowFeed(run_dir, replace(link, status=status or link.status)))
    for path, note in known_notes(run_dir):
        if chosen(note):
            feeds.append(PluginFeed(run_dir, path, replace(note, status=status or note.status)))
    return feeds
