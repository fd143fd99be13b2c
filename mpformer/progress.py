"""Lines a person can read while runs go on, made from the records that the runs write.

The record is read instead of anything being sent: so the lines are the same for a run in this process, in a
worker of Ray, in a trial of Ray Tune, or on another machine that writes to the same storage.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpformer.record import INIT_FILE, Point, parts, read_part
from mpformer.types import RunError

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_WAIT = 0.1
"""Share of a step that waiting for data may take before a line warns of it."""
WARNINGS_FILE = "warnings.log"


@contextmanager
def kept_warnings(run_dir: Path) -> Iterator[None]:
    """While the body runs, what a process without a terminal warns of goes to `RUN/warnings.log`."""
    handler = logging.FileHandler(Path(run_dir) / WARNINGS_FILE, encoding="utf-8", delay=True)
    logger = logging.getLogger("mpformer")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class Follower:
    """Follows one run's record and warnings from now on; what they held before is not told again."""

    def __init__(self, label: str, run_dir: Path, batch_size: int) -> None:
        self.label = label
        self.run_dir = run_dir
        self.batch_size = batch_size
        self._told = set(parts(run_dir))
        self._part: Path | None = None
        self._offset = 0
        self._warnings = run_dir / WARNINGS_FILE
        self._warned = self._warnings.stat().st_size if self._warnings.exists() else 0
        self._waits_from_start = True
        self.share = 0.0
        """Of its steps, as far as told."""

    @property
    def finished(self) -> bool:
        return (self.run_dir / "summary.json").exists()

    def lines(self) -> list[str]:
        """One line for each point, each start, and each warning since the last call."""
        lines = []
        for part in parts(self.run_dir):
            if part in self._told:
                continue
            if part != self._part:
                self._told |= {self._part} if self._part else set()
                self._part, self._offset = part, 0
                self._waits_from_start = True
            entries, self._offset = read_part(part, self._offset)
            lines += [text for entry in entries if (text := self._line(entry))]
        return lines + self._new_warnings()

    def _new_warnings(self) -> list[str]:
        if not self._warnings.exists():
            return []
        with self._warnings.open("rb") as file:
            file.seek(self._warned)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._warned += len(content)
        return [f"{self.label}  {line}" for line in content.decode(errors="replace").splitlines()]

    def _line(self, entry: Point | int) -> str:
        if isinstance(entry, int):
            return f"{self.label}  goes on from step {entry}" if entry else f"{self.label}  {self._start()}"
        total = self._total_steps()
        self.share = entry.step / total if total else 0.0
        values = entry.values
        texts = [f"{self.label}  step {entry.step}" + (f"/{total}" if total else "")]
        if (loss := values.get("train/loss")) is not None:
            texts.append(f"loss {loss:.3f}")
        if speed := values.get("speed/images_per_second"):
            texts.append(f"{speed:.1f} images/s")
            if (wait := values.get("time/data_wait")) is not None:
                share = wait * speed / self.batch_size
                # the first interval holds the wait for the first batch, which says nothing of the rest
                too_long = share > LONGEST_WAIT and not self._waits_from_start
                self._waits_from_start = False
                warning = " (too long: see mpformer data bench)" if too_long else ""
                texts.append(f"data wait {100 * share:.0f} %{warning}")
            if total and entry.step < total:
                texts.append(f"{_duration((total - entry.step) * self.batch_size / speed)} left")
        texts += [f"{key} {values[key]:.1f}" for key in ("val/AP", "val/PQ", "val/mIoU") if key in values]
        return "  ".join(texts)

    def _start(self) -> str:
        """With what became of the weights that it starts from, if it starts from any."""
        path = self.run_dir / INIT_FILE
        return "starts from " + "; ".join(path.read_text().splitlines()) if path.exists() else "starts"

    def _total_steps(self) -> int | None:
        path = self.run_dir / "progress.json"
        return json.loads(path.read_text())["total_steps"] if path.exists() else None


class Tally:
    """Counts the runs of a study that are finished, those included that were before."""

    label = "study"

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers
        self._began = time.monotonic()
        self._finished = self._before = sum(follower.finished for follower in followers)

    def lines(self) -> list[str]:
        """A line whenever more are finished than at the last call. The time left supposes that all runs take
        equally long; to be asked after the followers."""
        finished, total = sum(follower.finished for follower in self._followers), len(self._followers)
        if finished == self._finished:
            return []
        self._finished = finished
        text = f"{finished} of {total} runs finished"
        if finished < total:
            done = sum(1.0 if follower.finished else follower.share for follower in self._followers)
            each = (time.monotonic() - self._began) / (done - self._before)
            text += f", about {_duration(each * (total - done))} left"
        return [text]


@contextmanager
def follow(followers: Sequence[Follower | Tally], tell: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, tell what the runs' records say, from a thread."""
    done = threading.Event()

    def look() -> None:
        for follower in followers:
            try:
                for line in follower.lines():
                    tell(line)
            except (
                OSError,
                ValueError,
                RunError,
            ) as error:  # a file just being replaced: the next look has it
                tell(f"{follower.label}  its record cannot be read just now: {error}")

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes}:{seconds:02d} min"
