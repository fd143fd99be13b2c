"""Named timers of a run: where a step's seconds go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager


class Timers:
    """Seconds per name since the last `take`, and over the whole life.

    Host time: on a GPU the seconds of queued work show up where the host waits for it.
    """

    def __init__(self) -> None:
        self._recent: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self.phase = "start"
        """The timer that runs, the innermost one; after an exception that in which it was raised."""
        self.annotate: Callable[[str], AbstractContextManager[object]] | None = None
        """Makes a context of a timer's name, entered while it runs: a profiler's range."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        outer, self.phase = self.phase, name
        try:
            with self.annotate(name) if self.annotate else contextlib.nullcontext():
                yield
        finally:
            self.add(name, time.perf_counter() - start)
        self.phase = outer

    def add(self, name: str, seconds: float) -> None:
        self._recent[name] = self._recent.get(name, 0.0) + seconds
        self.total[name] = self.total.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds per name since the last call."""
        recent, self._recent = self._recent, {}
        return recent


class Clock:
    """Seconds of training: pauses for evaluations, checkpoints and logging are left out. Starts stopped."""

    def __init__(self, total: float = 0.0) -> None:
        self.total = total
        """Seconds over the whole life of the run, up to the last pause."""
        self._lap = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds between the last call and the last pause."""
        lap, self._lap = self._lap, 0.0
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the body runs; a stopped clock stays stopped."""
        running = self._since is not None
        if self._since is not None:
            seconds = time.perf_counter() - self._since
            self.total += seconds
            self._lap += seconds
            self._since = None
        try:
            yield
        finally:
            if running:
                self.start()
