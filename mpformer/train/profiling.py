"""`train.profile`: a trace of some steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mpformer.tracking.run_dir import RunDir
from mpformer.train.timing import Timers

UNTIMED = 8
"""Steps before the profiler starts: compilation, choice of algorithms, growth of the allocator's pools."""
WARM_UP = 2
"""Steps that the profiler sees and forgets, since its own start takes time."""


class StepProfiler:
    """Told of the end of each step. This one records nothing."""

    def step(self) -> None:
        """A step has ended."""


class _Recorder(StepProfiler):
    def __init__(self, record: profile) -> None:
        self._record = record

    def step(self) -> None:
        self._record.step()


@contextlib.contextmanager
def profiled_steps(
    steps: int, run_dir: RunDir, device: torch.device, timers: Timers, start: int
) -> Iterator[StepProfiler]:
    """A profiler of `steps` steps, 0 for none, of a run that goes on from step `start`.

    It records after `UNTIMED + WARM_UP` steps, and writes `RunDir.trace` of its first step when it is through
    or the body ends. The phases of the timers are ranges of the trace.
    """
    if not steps:
        yield StepProfiler()
        return
    first = start + UNTIMED + WARM_UP
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    timers.annotate = record_function

    def write(record: profile) -> None:
        record.export_chrome_trace(str(run_dir.trace(first)))

    plan = schedule(wait=UNTIMED, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as record:
        yield _Recorder(record)
