"""What the runs of a study have measured, read from their folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpformer.ablation.spec import Study, Trial
from mpformer.record import read_metrics
from mpformer.train.summary import read_summary


@dataclass(frozen=True)
class RunResult:
    """One run: its record, and its summary once it has ended well."""

    trial: Trial
    history: list[tuple[int, dict[str, float]]]
    """(step, {metric key: value}), steps ascending."""
    summary: Mapping[str, Any] | None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The final metrics of a finished run; empty before."""
        return self.summary["metrics"] if self.summary else {}

    def untrained(self, metric: str) -> float | None:
        """A metric of the model before its first step."""
        return next((values[metric] for step, values in self.history if step == 0 and metric in values), None)

    def curve(self, metric: str, x: str) -> list[tuple[float, float]]:
        """(x, metric) points, x in `images` seen or in `steps`."""
        per_step = self.trial.config.train.batch_size if x == "images" else 1
        return [(step * per_step, values[metric]) for step, values in self.history if metric in values]


Results = Mapping[str, Mapping[int, RunResult]]
"""Row, then seed."""


def collect(study: Study) -> Results:
    """What exists of a study's runs; rows and seeds without a run are absent."""
    found: dict[str, dict[int, RunResult]] = {row: {} for row in study.rows}
    for trial in study.trials():
        if trial.run_dir.is_dir():
            found[trial.row][trial.seed] = read_run(trial)
    return found


def read_run(trial: Trial) -> RunResult:
    """The result of one run. Raises `RunError` where its record is damaged."""
    return RunResult(trial, read_metrics(trial.run_dir), read_summary(trial.run_dir))


def values_by_seed(results: Results, row: str, metric: str) -> dict[int, float]:
    """A metric of the finished runs of a row; a run that did not measure it is absent."""
    found = {seed: run.metrics.get(metric) for seed, run in results.get(row, {}).items()}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}
