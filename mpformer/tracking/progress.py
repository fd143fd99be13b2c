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

from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.record import Point, read_entries, record_files
from mpformer.tracking.run_dir import INHERITED, RunDir
from mpformer.types import RunError

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_WAIT = 0.1
"""Share of a step that waiting for data may take before a line warns of it."""
QUALITY = ("val/AP", "val/PQ", "val/mIoU")
_AVERAGED = tuple(key.replace(PLAIN, AVERAGED) for key in QUALITY)


@contextmanager
def kept_warnings(run_dir: Path) -> Iterator[None]:
    """While the body runs, what a process without a terminal warns of goes to `RUN/warnings.log`."""
    handler = logging.FileHandler(RunDir(run_dir).warnings, encoding="utf-8", delay=True)
    logger = logging.getLogger("mpformer")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class Follower:
    """Follows one run's record and warnings from now on; what they held before is not told again.

    Besides the lines it keeps what a table of runs shows: `values`, the newest of each key since the process
    began; `step` of `total_steps` (None before the run knows); `begun`, `finished`, `failed`.
    """

    def __init__(self, label: str, run_dir: Path, batch_size: int) -> None:
        self.label = label
        self.run_dir = run_dir
        self.batch_size = batch_size
        self.values: dict[str, float] = {}
        self.step = self._first_step = 0
        self.total_steps: int | None = None
        self.begun = self.failed = False
        self._told = set(record_files(run_dir))
        self._file: Path | None = None
        self._offset = 0
        self._warnings = RunDir(run_dir).warnings
        self._warned = self._warnings.stat().st_size if self._warnings.exists() else 0
        self._waits_from_start = True

    @property
    def finished(self) -> bool:
        return RunDir(self.run_dir).finished

    @property
    def shares(self) -> tuple[float, float]:
        """Of its steps: those made since the process began, and those still to be made."""
        if not self.total_steps:
            return 0.0, 1.0
        return max(0, self.step - self._first_step) / self.total_steps, 1 - self.step / self.total_steps

    @property
    def time_left(self) -> str | None:
        """At the newest speed; None before there is one, and at the end."""
        speed = self.values.get("speed/images_per_second")
        if not speed or not self.total_steps or self.step >= self.total_steps:
            return None
        return f"{duration_text((self.total_steps - self.step) * self.batch_size / speed)} left"

    def lines(self, points: bool = True) -> list[str]:
        """One line for each start, each warning, and, with `points`, each point since the last call."""
        lines = []
        for file in record_files(self.run_dir):
            if file in self._told or file.name == INHERITED:
                continue
            if file != self._file:
                self._told |= {self._file} if self._file else set()
                self._file, self._offset = file, 0
                self._waits_from_start = True
            entries, self._offset = read_entries(file, self._offset)
            told = [self._line(entry) for entry in entries]
            lines += [text for entry, text in zip(entries, told) if points or isinstance(entry, int)]
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
            self.step = entry
            if not self.begun:
                self._first_step = entry
            self.begun = True
            return f"{self.label}  {self._goes_on(entry) if entry else self._start()}"
        total = self.total_steps = self._read_total_steps()
        self.step, values = entry.step, entry.values
        self.values.update(values)
        texts = [f"{self.label}  step {entry.step}" + (f"/{total}" if total else "")]
        if (loss := values.get("train/loss")) is not None:
            texts.append(f"loss {loss:.3f}")
        if (pilot_loss := values.get("train/pilot_loss")) is not None:
            texts.append(f"pilot loss {pilot_loss:.3f}")
        if speed := values.get("speed/images_per_second"):
            texts.append(f"{speed:.1f} images/s")
            if (wait := values.get("time/data_wait")) is not None:
                share = wait * speed / self.batch_size
                # the first interval holds the wait for the first batch, which says nothing of the rest
                too_long = share > LONGEST_WAIT and not self._waits_from_start
                self._waits_from_start = False
                warning = " (too long: see mpformer data bench)" if too_long else ""
                texts.append(f"data wait {100 * share:.0f} %{warning}")
            if self.time_left:
                texts.append(self.time_left)
        texts += [f"{key} {values[key]:.1f}" for key in (*QUALITY, *_AVERAGED) if key in values]
        if (loss := values.get("val/loss")) is not None:
            texts.append(f"val/loss {loss:.3f}")
        return "  ".join(texts)

    def _start(self) -> str:
        """With what became of the weights that it starts from, if it starts from any."""
        path = RunDir(self.run_dir).init
        return "starts from " + "; ".join(path.read_text().splitlines()) if path.exists() else "starts"

    def _goes_on(self, step: int) -> str:
        parent = read_parent(self.run_dir)
        of_another = f" of {parent.run}" if parent is not None and parent.step == step else ""
        return f"goes on from step {step}{of_another}"

    def _read_total_steps(self) -> int | None:
        path = RunDir(self.run_dir).progress
        return json.loads(path.read_text())["total_steps"] if path.exists() else None


class Tally:
    """Counts the runs of a study that are finished, those included that were before."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers
        self._began = time.monotonic()
        self._finished = self._before = sum(follower.finished for follower in followers)

    def lines(self) -> list[str]:
        """A line whenever more are finished than at the last call; to be asked after the followers."""
        finished = sum(follower.finished for follower in self._followers)
        if finished == self._finished:
            return []
        self._finished = finished
        return [self.text()]

    def text(self) -> str:
        """How many are finished, and the time left, which supposes that all runs take equally long."""
        finished = sum(follower.finished for follower in self._followers)
        going_on = [follower for follower in self._followers if not follower.finished and not follower.failed]
        total = len(self._followers)
        failed = total - finished - len(going_on)
        text = f"{finished} of {total} runs finished" + (f", {failed} failed" if failed else "")
        done = finished - self._before + sum(follower.shares[0] for follower in going_on)
        if going_on and done > 0:
            each = (time.monotonic() - self._began) / done
            text += f", about {duration_text(each * sum(follower.shares[1] for follower in going_on))} left"
        return text


@contextmanager
def follow(
    followers: Sequence[Follower],
    tell: Callable[[str], None],
    tally: Tally | None = None,
    points: bool = True,
) -> Iterator[None]:
    """While the body runs, tell what the runs' records say, from a thread.

    Without `points` the followers only take them in; a `tally` has the last word of each look.
    """
    done = threading.Event()

    def look() -> None:
        for follower in followers:
            try:
                for line in follower.lines(points):
                    tell(line)
            except (OSError, ValueError, RunError) as error:
                # a file just being replaced: the next look has it
                tell(f"{follower.label}  its record cannot be read just now: {error}")
        for line in tally.lines() if tally else []:
            tell(line)

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


def duration_text(seconds: float) -> str:
    """Seconds as "2:48 min" or "3 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes}:{seconds:02d} min"
