"""What rank 0 alone does for a run: its record, checkpoints, background evaluations, pictures and summary."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mpformer import atomic
from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.data.records import Catalog
from mpformer.draw import attempted
from mpformer.evaluate.evaluation import measure
from mpformer.evaluate.pages import write_page
from mpformer.evaluate.prediction import Prediction
from mpformer.model.architecture import Architecture
from mpformer.tracking.run_dir import RunDir
from mpformer.tracking.tracker import Tracker
from mpformer.train import checkpoint
from mpformer.train.background import BackgroundEvaluator, NoBackgroundEvaluator
from mpformer.train.ema import WeightAverage
from mpformer.train.job import Job, StepPlan
from mpformer.train.judgement import check_measured, stops_early
from mpformer.train.mirror import Mirror, NoMirror
from mpformer.train.summary import write_summary
from mpformer.train.timing import Timers


class SilentReporter:
    """The reporter of every rank but 0: does nothing. Says what `Reporter` does on rank 0."""

    def resume_evaluations(self, start: int) -> None:
        """Begin the background evaluations that an earlier start of the run left."""

    def training(self, step: int, losses: dict[str, Tensor], values: dict[str, float]) -> None:
        """Record a point of training: `losses` of the global batch, and other values by metric key."""

    def evaluate_in_background(self, step: int, model: Architecture, values: dict[str, float]) -> None:
        """Record `values`, and have the weights of a step evaluated while training goes on."""

    def finish_evaluations(self) -> None:
        """Wait for the evaluation in the background."""

    def evaluated(
        self, step: int, predictions: dict[str, list[Prediction]], values: dict[str, float]
    ) -> dict[str, float]:
        """Score the predictions of the whole split and record the figures and `values`; the figures by key.

        predictions: of the weights (`PLAIN`), and of their average (`AVERAGED`) if there is one.
        """
        return {}

    def stops_early(self, step: int) -> bool:
        """Whether training ends after the evaluation of a step."""
        return False

    def save(
        self,
        step: int,
        model: Architecture,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        average: WeightAverage | None,
    ) -> None:
        """Write the checkpoint of a step; what was recorded up to it goes to the trackers and the mirror."""

    def finish(self, step: int, timers: Timers, resources: dict[str, Any]) -> None:
        """Write the summary and close the record of a run that has ended after so many steps."""

    def fail(self) -> None:
        """Close the record of a run that has failed."""

    def finish_mirror(self) -> None:
        """Copy what the mirror lacks of a finished run."""


class Reporter(SilentReporter):
    """The reporter of rank 0.

    start: the step that the run goes on from; val: the validation split; init_report: what was loaded from
    `train.init`, None without it. Raises `RunError` where the record cannot be written.
    """

    def __init__(
        self,
        job: Job,
        plan: StepPlan,
        start: int,
        val: Catalog,
        init_report: str | None,
        mirror: Mirror | NoMirror,
    ) -> None:
        self._job, self._config, self._plan, self._val, self._mirror = job, job.config, plan, val, mirror
        self._files = RunDir(job.run_dir)
        if init_report is not None:
            self._files.init.write_text(init_report, encoding="utf-8")
        progress = {"name": self._config.name, "start_step": start, "total_steps": plan.total}
        atomic.write_text(self._files.progress, json.dumps(progress))
        self._tracker = Tracker.open(
            job.run_dir,
            self._config,
            start_step=start,
            entry=job.entry,
            mlflow_uri=job.mlflow_uri,
            run_name=f"{self._config.name}-s{self._config.train.seed}",
        )
        self._background: BackgroundEvaluator | NoBackgroundEvaluator = NoBackgroundEvaluator()
        if self._config.cluster.evaluators:
            self._background = BackgroundEvaluator(job.run_dir, self._config, job.val, self._tracker)

    def resume_evaluations(self, start: int) -> None:
        self._background.resume(start)

    def training(self, step: int, losses: dict[str, Tensor], values: dict[str, float]) -> None:
        numbers = torch.stack(list(losses.values())).tolist()
        point = {f"train/{name}": number for name, number in zip(losses, numbers)}
        self._tracker.log(step, point | values)
        self._background.collect(wait=False)

    def evaluate_in_background(self, step: int, model: Architecture, values: dict[str, float]) -> None:
        self._tracker.log(step, values)
        self._background.submit(step, model)

    def finish_evaluations(self) -> None:
        self._background.collect()

    def evaluated(
        self, step: int, predictions: dict[str, list[Prediction]], values: dict[str, float]
    ) -> dict[str, float]:
        evaluation = measure(predictions[PLAIN], self._val, self._config)
        figures, diagnostics = evaluation.figures(PLAIN), evaluation.diagnostics()
        averaged = None
        if AVERAGED in predictions:
            averaged = measure(predictions[AVERAGED], self._val, self._config)
            figures |= averaged.figures(AVERAGED)
        check_measured(self._config, figures)
        self._tracker.log(step, {**figures, **diagnostics, **values})
        count = self._config.evaluate.pictures
        if (self._plan.is_last(step) or self.stops_early(step)) and count:
            folder, title = self._files.pictures, f"{self._config.name}, step {step}"
            attempted(
                lambda: write_page(folder, title, evaluation, averaged=averaged, count=count),
                "page of the evaluation",
            )
        return figures

    def stops_early(self, step: int) -> bool:
        return stops_early(self._job.run_dir, self._config, step) is not None

    def save(
        self,
        step: int,
        model: Architecture,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        average: WeightAverage | None,
    ) -> None:
        checkpoint.save(self._job.run_dir, step, model, optimizer, self._config, state, average)
        self._tracker.commit(step)
        self._background.committed()
        self._mirror.push()

    def finish(self, step: int, timers: Timers, resources: dict[str, Any]) -> None:
        run_dir = self._job.run_dir
        stopped = None if self._plan.is_last(step) else stops_early(run_dir, self._config, step)
        write_summary(run_dir, self._config, step, timers, resources, stopped)
        self._tracker.finish()

    def fail(self) -> None:
        self._tracker.finish("FAILED")

    def finish_mirror(self) -> None:
        self._mirror.finish()
