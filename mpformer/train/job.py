"""What the driver hands to each worker of a run, and the run's lengths in optimiser steps. Imports no ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.config import Config, duration_in_steps
from mpformer.tracking.entry import Entry
from mpformer.train.judgement import judged

if TYPE_CHECKING:
    import ray


@dataclass(frozen=True)
class Job:
    """One start of a run."""

    config: Config
    run_dir: Path
    train: ray.ObjectRef
    """The training split's `Catalog`."""
    val: ray.ObjectRef
    """The validation split's `Catalog`."""
    token: str
    """Identifies this call of the driver: a failure that was reported to it is not tried again."""
    entry: Entry
    mlflow_uri: str | None
    init: Path | str | None
    """The file of `train.init`, or the name of weights that lie elsewhere; None without it, or where the run
    has begun."""
    begun: int | None = None
    """The step of the checkpoint that the driver has found; None where the run has not begun."""
    use_gpu: bool = True
    """Whether workers train on the GPU that they see; where they claim none, they may still see one."""


@dataclass(frozen=True)
class StepPlan:
    """After which optimiser steps a run logs, evaluates and writes checkpoints. Steps count from 1."""

    total: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    """None: only at the end."""
    judged: bool = False
    """Whether something depends on the evaluations (`mpformer.train.judgement`): each gets a checkpoint."""

    @classmethod
    def of(cls, config: Config, images: int) -> StepPlan:
        """`images`: those of the training split, for durations in epochs."""

        def steps(duration: str) -> int:
            return duration_in_steps(duration, images, config.train.batch_size)

        every = config.evaluate.every
        return cls(
            total=steps(config.train.length),
            log_every=config.train.log_every,
            checkpoint_every=steps(config.train.checkpoint_every),
            evaluate_every=None if every is None else steps(every),
            judged=judged(config),
        )

    def is_last(self, step: int) -> bool:
        return step == self.total

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or self.is_last(step)

    def evaluates(self, step: int) -> bool:
        due = self.evaluate_every is not None and step % self.evaluate_every == 0
        return due or self.is_last(step)

    def saves(self, step: int) -> bool:
        due = step % self.checkpoint_every == 0 or (self.judged and self.evaluates(step))
        return due or self.is_last(step)
