"""Time, work lost and machine-hours of runs on machines that are taken away. Imports neither torch nor ray.

Interruptions come at random (a Poisson process) with a rate per hour and machine; a run stands on one or more
machines and stops when any of them goes. It then starts again from its latest checkpoint. J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", 2006, gives the expected time in
closed form.

`--plan` calls it per run and then lays the runs side by side:

    spot = Interruptions(per_hour=0.05, interval_hours=0.5, checkpoint_hours=0.005, restart_hours=0.05)
    spent = spot.spent(training_hours=62.5, machines=2)         # spent.total, .lost, .interruptions, ...
    hours = makespan([spent.total, ...], [gpus, ...], gpus_there)
    best = best_interval(0.05 * 2, checkpoint_hours=0.005)      # hours of training between two checkpoints
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpformer.types import InputError


@dataclass(frozen=True)
class Spent:
    """Expected hours of one run; the four parts add up to `total`."""

    training: float
    """What the run needs without interruption."""
    checkpoints: float
    """Writing those checkpoints that were of use."""
    lost: float
    """Training and writing that an interruption threw away."""
    restarting: float
    """From an interruption until the run trains again."""
    interruptions: float
    """How many interruptions are expected."""

    @property
    def total(self) -> float:
        return self.training + self.checkpoints + self.lost + self.restarting

    @property
    def factor(self) -> float:
        """Expected hours per hour of training."""
        return self.total / self.training


@dataclass(frozen=True)
class Interruptions:
    """What a fleet does to a run. All times in hours."""

    per_hour: float = 0.0
    """Interruptions of one machine."""
    interval_hours: float = 0.5
    """Training between two checkpoints."""
    checkpoint_hours: float = 0.0
    """Writing one checkpoint, in which training stands still."""
    restart_hours: float = 0.0
    """Start after an interruption: new machine, processes, checkpoint. It can be interrupted, too."""

    def spent(self, training_hours: float, machines: int = 1) -> Spent:
        """Expected hours of a run of `training_hours` > 0 that needs all of its `machines`."""
        segments = training_hours / self.interval_hours
        writing = segments * self.checkpoint_hours
        rate = self.per_hour * machines
        if rate == 0:
            return Spent(training_hours, writing, 0.0, 0.0, 0.0)
        segment = self.interval_hours + self.checkpoint_hours
        total = segments * math.exp(rate * self.restart_hours) * math.expm1(rate * segment) / rate
        interruptions = rate * total
        # a restart lasts until it is done or interrupted, and each interruption begins one
        restarting = interruptions * -math.expm1(-rate * self.restart_hours) / rate
        lost = total - training_hours - writing - restarting
        return Spent(training_hours, writing, lost, restarting, interruptions)


def best_interval(per_hour: float, checkpoint_hours: float) -> float:
    """Hours of training between two checkpoints for which a run takes least; infinite without interruptions.

    `per_hour`: interruptions of the run, all its machines together. The exact minimum of
    `Interruptions.spent`: the root of 1 - rT = exp(-r (T + C)); about sqrt(2 C / r) where that is short
    against 1 / r.
    """
    if per_hour == 0:
        return math.inf
    low, high = 0.0, 1 / per_hour
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - per_hour * middle > math.exp(-per_hour * (middle + checkpoint_hours)):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def makespan(hours: Sequence[float], gpus_of_run: Sequence[int], gpus: int) -> float:
    """Hours until all runs are done when the longest that fits is started next, as soon as GPUs are free.

    Fed with the expected hours of interrupted runs it foretells a fleet's mean makespan to a few per cent.
    Raises `InputError` for a run that needs more GPUs than there are.
    """
    if (widest := max(gpus_of_run, default=0)) > gpus:
        raise InputError(f"plan.gpus: a run needs {widest} GPUs (cluster.workers); there are {gpus}")
    waiting = sorted(zip(hours, gpus_of_run), reverse=True)
    running: list[tuple[float, int]] = []
    now, free = 0.0, gpus
    while waiting or running:
        held = []
        for run in waiting:
            if run[1] <= free:
                heapq.heappush(running, (now + run[0], run[1]))
                free -= run[1]
            else:
                held.append(run)
        waiting = held
        now, width = heapq.heappop(running)
        free += width
    return now
