"""A tracker from outside the package: TensorBoard, with the writer that comes with `ray[tune]`.

tracking:
  also: [{kind: tensorboard_tracker:TensorBoard, options: {folder: runs/tensorboard}}]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from mpformer.tracking.plugins import TrackedRun
from mpformer.tracking.record import Point


class TensorBoard:
    """One folder of event files per run, written anew whenever the run starts or resumes.

    Event files can only be appended to, so an interrupted `send` cannot be told from a complete one. The
    record holds every point: the folder begins empty and gets all of them again.
    """

    failures = (OSError,)

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def open(self, run: TrackedRun, sent: Mapping[str, int]) -> Mapping[str, int]:
        place = self.folder / run.experiment / run.name
        shutil.rmtree(place, ignore_errors=True)
        self.writer = SummaryWriter(str(place))
        for key, value in run.parameters.items():
            self.writer.add_text(key, value)
        return {}

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            for key, value in point.values.items():
                self.writer.add_scalar(key, value, point.step, walltime=point.time / 1000)
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.add_text("status", status)
        self.writer.close()
