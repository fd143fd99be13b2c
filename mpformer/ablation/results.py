"""The measurements of a study's runs, read from their folders or from MLflow alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpformer import atomic
from mpformer.ablation.spec import Study, Trial
from mpformer.ablation.studyfile import split_column
from mpformer.config.figures import ranked
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.record import read_metrics, read_summary
from mpformer.tracking.run_dir import RunDir
from mpformer.types import RunError

History = list[tuple[int, dict[str, float]]]
"""(step, {metric key: value}), steps ascending."""


@dataclass(frozen=True)
class RunResult:
    """The record of one run."""

    history: History
    finished: bool
    batch_size: int
    workers: int = 1
    best: str | None = None
    """The figure whose best evaluation counts; None: the last one does."""
    first: int = 1
    """The first step whose weights the run has or had: not the untrained ones, nor all of its parent's."""

    @property
    def step(self) -> int | None:
        """The step whose figures count: the last, or the best one; None for a run that has no record."""
        if not self.history:
            return None
        if self.best is not None:
            measured = ((s, v[self.best]) for s, v in self.history if s >= self.first and self.best in v)
            if order := ranked(self.best, measured):
                return order[0][0]
        return self.history[-1][0]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures at the step that counts of a finished run, with its hours; empty before.

        Of what is told of the training (`speed/...`) the last word up to that step: not every step has one.
        """
        if not self.finished or (chosen := self.step) is None:
            return {}
        final = {
            key: value
            for step, values in self.history
            for key, value in values.items()
            if step == chosen or (step < chosen and key.startswith("speed/"))
        }
        if (seconds := final.get("speed/train_seconds")) is not None:
            final["speed/clock_hours"] = seconds / 3600
        return final

    def untrained(self, metric: str) -> float | None:
        """A metric of the model before its first step."""
        return next((values[metric] for step, values in self.history if step == 0 and metric in values), None)

    @property
    def evaluated_untrained(self) -> bool:
        """Whether there are figures of the model before its first step."""
        return any(step == 0 and any(k.startswith("val/") for k in values) for step, values in self.history)

    def curve(self, metric: str, x: str) -> list[tuple[float, float]]:
        """(x, metric) points; x in `images` seen, optimiser `steps`, or hours of all GPUs (of all workers,
        where there is none) as `gpu_hours`."""
        return [
            (self._x(x, step, values), values[metric])
            for step, values in self.history
            if metric in values and (x != "gpu_hours" or step == 0 or "speed/train_seconds" in values)
        ]

    def _x(self, x: str, step: int, values: Mapping[str, float]) -> float:
        if x == "gpu_hours":
            return values.get("speed/train_seconds", 0.0) * self.workers / 3600
        return step * (self.batch_size if x == "images" else 1)


Results = Mapping[tuple[str, str], Mapping[int, RunResult]]
"""By (row, part), then seed."""


def collect(study: Study) -> Results:
    """The runs of a study that exist in its folder; seeds without a run are absent."""
    found: dict[tuple[str, str], dict[int, RunResult]] = {key: {} for key in study.runs}
    for trial in study.trials():
        if trial.run_dir.is_dir():
            found[trial.row, trial.part][trial.seed] = read_trial(study, trial)
    return found


def read_trial(study: Study, trial: Trial) -> RunResult:
    """The result of a run of a study, or of a sample of its search: of the weights that the study takes.

    Raises `RunError` where its record is damaged.
    """
    history, summary = read_metrics(trial.run_dir), read_summary(trial.run_dir)
    if summary is not None and history:
        history = sorted([*history, *read_pilots(trial.run_dir, history[-1][0]).items()], key=lambda p: p[0])
    parent = read_parent(trial.run_dir)
    return RunResult(
        history,
        summary is not None,
        trial.config.train.batch_size,
        (summary or {}).get("workers", 1),
        _best(study, trial),
        first=parent.step if parent else 1,
    )


def read_pilots(run_dir: Path, last: int) -> dict[int, dict[str, float]]:
    """{step: {"diag/pilot_...": value}} that `write_pilots` stored for a run; last: the run's last step."""
    file = RunDir(run_dir).diagnose
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if any(key.startswith("diag/") for key in content):  # of version 0.1: figures of the last step
        return {last: content}
    return {int(step): figures for step, figures in content.items()}


def write_pilots(run_dir: Path, pilots: Mapping[int, Mapping[str, float]]) -> None:
    """Store what was measured of a run's pilots after training. Raises `OSError`."""
    atomic.write_text(RunDir(run_dir).diagnose, json.dumps(pilots))


def _best(study: Study, trial: Trial) -> str | None:
    return trial.config.train.keep.best if study.file.figures == "best" else None


def collect_mlflow(study: Study, uri: str) -> Results:
    """As `collect`, from an MLflow store, also a remote one.

    Raises `InputError` for a URI of no MLflow store, `RunError` where the store does not answer or lacks the
    study.
    """
    from mpformer.tracking.mlflow_store import check_uri, client, first_line, mlflow_failures

    if check_uri(uri) == "sqlite" and not Path(uri.partition(":///")[2]).is_file():
        raise RunError(f"MLflow {uri}: there is no such file")  # MLflow would create it
    found: dict[tuple[str, str], dict[int, RunResult]] = {key: {} for key in study.runs}
    try:
        store = client(uri)
        experiment = store.get_experiment_by_name(study.name)
        if experiment is None:
            raise RunError(f"MLflow {uri}: it has no experiment '{study.name}'")
        for trial in study.trials():
            tags = {"row": trial.config.name, "seed": trial.seed, "hash": trial.run_dir.name.split("-")[-2]}
            query = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
            runs = store.search_runs(
                [experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1
            )
            for run in runs:
                keys = [
                    key
                    for key in run.data.metrics
                    if key.split("/")[0] in ("val", "val_ema", "diag", "speed")
                ]
                points = ((key, store.get_metric_history(run.info.run_id, key)) for key in keys)
                history = _by_step((m.step, key, m.value) for key, metrics in points for m in metrics)
                found[trial.row, trial.part][trial.seed] = RunResult(
                    history,
                    run.info.status == "FINISHED",
                    trial.config.train.batch_size,
                    trial.config.cluster.workers,
                    _best(study, trial),
                )
    except mlflow_failures() as error:
        raise RunError(f"MLflow {uri}: {first_line(error)}") from error
    return found


def _by_step(points: Iterable[tuple[int, str, float]]) -> History:
    steps: dict[int, dict[str, float]] = {}
    for step, key, value in points:
        steps.setdefault(step, {})[key] = value
    return sorted(steps.items())


def runs_of(results: Results, row: str, column: str) -> Mapping[int, RunResult]:
    """By seed: the runs that a row's value of a column comes from."""
    part, _ = split_column(column)
    return results.get((row, part), {})


def values_by_seed(results: Results, row: str, column: str) -> dict[int, float]:
    """A column of the finished runs of a row; a run that did not measure it is absent."""
    _, metric = split_column(column)
    found = {seed: run.metrics.get(metric) for seed, run in runs_of(results, row, column).items()}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}
