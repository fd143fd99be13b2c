"""Named timers of a run: where a step's seconds go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timers:
    """Seconds per name since the last `take`, and over the whole life.

    Host time: on a GPU the seconds of queued work show up where the host waits for it.
    """

    def __init__(self) -> None:
        self._recent: dict[str, float] = {}
        self.total: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self._recent[name] = self._recent.get(name, 0.0) + seconds
        self.total[name] = self.total.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds per name since the last call."""
        recent, self._recent = self._recent, {}
        return recent
