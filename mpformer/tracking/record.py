"""The record of a run: `RUN/metrics/0001.jsonl`, `0002.jsonl`, ..., the source of truth.

Each (re)start writes a file of its own, one line per point; no later start appends to it. A file begins with
the step that its start went on from; what older files say about later steps is void: the run repeated them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.tracking.run_dir import INHERITED, RunDir
from mpformer.types import RunError


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None for one that is not finished. `RunError` for a damaged one."""
    path = RunDir(run_dir).summary
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except ValueError as error:
        raise RunError(
            f"{path}: damaged ({error}): delete it, and the same command writes it again from the run's "
            "record and last checkpoint"
        ) from None


@dataclass(frozen=True)
class Point:
    """What was measured at one step: `values` by metric key, and when (`time`, milliseconds since 1970)."""

    step: int
    time: int
    values: dict[str, float]


def read_points(run_dir: Path) -> list[Point]:
    """The record of a run in the order of its steps, cut where later starts went on from an earlier step.

    A line torn by a kill is left out. Non-finite values come back as NaN. Raises `RunError` for a damaged
    line.
    """
    points: list[Point] = []
    for file in record_files(run_dir):
        for entry in read_entries(file)[0]:
            if isinstance(entry, int):
                points = [point for point in points if point.step <= entry]
            else:
                points.append(entry)
    return merge_steps(points)


def merge_steps(points: Iterable[Point]) -> list[Point]:
    """One point per step, steps ascending; what was measured twice at a step is what was measured last."""
    by_step: dict[int, Point] = {}
    for point in points:
        earlier = by_step.get(point.step)
        values = {**earlier.values, **point.values} if earlier else point.values
        by_step[point.step] = Point(point.step, point.time, values)
    return [by_step[step] for step in sorted(by_step)]


def read_metrics(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """The record as [(step, {key: value})], steps ascending, each once."""
    return [(point.step, point.values) for point in read_points(run_dir)]


def record_files(run_dir: Path) -> list[Path]:
    """The files of a run's record, oldest first."""
    return sorted(RunDir(Path(run_dir)).metrics.glob("[0-9]*.jsonl"))


def read_entries(path: Path, offset: int = 0) -> tuple[list[Point | int], int]:
    """The entries of a file from byte `offset` on, and the offset after them: first the step that its start
    went on from, then its points. Raises `RunError` for a damaged line."""
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]  # what follows is being written, or was torn by a kill
    entries: list[Point | int] = []
    for line in content.splitlines():
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            shown = line[:40].decode(errors="replace")
            raise RunError(f"{path}: a damaged line, '{shown}': {error}") from None
        entries.append(fields["start_step"] if "start_step" in fields else _point(fields))
    return entries, offset + len(content)


def _point(fields: dict[str, Any]) -> Point:
    step, stamp = fields.pop("step"), fields.pop("time")
    return Point(step, stamp, {key: math.nan if value is None else value for key, value in fields.items()})


def _fields(point: Point) -> dict[str, Any]:
    finite = {key: value if math.isfinite(value) else None for key, value in point.values.items()}
    return {"step": point.step, "time": point.time, **finite}


def inherit(run_dir: Path, parent_dir: Path, step: int) -> None:
    """Begin the record of a run with that of another up to a step, as `0000.jsonl`.

    A reader then finds one curve. Raises `OSError`, and `RunError` where the other record is damaged.
    """
    points = [point for point in read_points(parent_dir) if point.step <= step]
    start = {"start_step": 0, "time": _now(), "resumed_from": parent_dir.name, "resumed_at_step": step}
    lines = [start, *map(_fields, points)]
    folder = RunDir(run_dir).metrics
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / INHERITED, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


class RecordWriter:
    """Writes the file of this start of a run."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        older = record_files(run_dir)
        number = int(older[-1].stem) + 1 if older else 1
        self.path = RunDir(Path(run_dir)).metrics / f"{number:04d}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        self._write({"start_step": start_step, "time": _now()})

    def add(self, step: int, values: Mapping[str, float]) -> Point:
        """Write one point at once. Raises `RunError` where the disk refuses."""
        point = Point(step, _now(), {key: float(value) for key, value in values.items()})
        self._write(_fields(point))
        return point

    def sync(self) -> None:
        """From here on the points survive a power cut, too."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(fields, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written: {error.strerror}")


def _now() -> int:
    return time.time_ns() // 1_000_000
