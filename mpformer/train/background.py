"""Evaluation in the background: Ray tasks evaluate the weights of a step while training continues.

The weights are kept in `RUN/evaluations/step-00000400.safetensors` until a checkpoint covers the figures of
their evaluation. A run that was interrupted in between finds them there and evaluates them then: no point is
missing or double. One evaluation runs at a time; if the next is due before it ends, training waits.
"""

from __future__ import annotations

from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from mpformer import atomic
from mpformer.config import Config
from mpformer.data.records import Catalog
from mpformer.evaluate.evaluation import measure
from mpformer.evaluate.inference import predict_on_workers
from mpformer.model.architecture import Architecture
from mpformer.model.weights.loading import load_checkpoint
from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir
from mpformer.tracking.tracker import Tracker
from mpformer.train import checkpoint
from mpformer.train.judgement import check_measured


class NoBackgroundEvaluator:
    """That of a run whose workers evaluate (`cluster.evaluators` is 0)."""

    def resume(self, start: int) -> None:
        pass

    def submit(self, step: int, model: Architecture) -> None:
        raise RuntimeError("cluster.evaluators is 0: the workers evaluate, nothing is submitted")

    def collect(self, *, wait: bool = True) -> None:
        pass

    def committed(self) -> None:
        pass


class BackgroundEvaluator:
    """The background evaluations of one start of a run. For one process only: rank 0."""

    def __init__(self, run_dir: Path, config: Config, val: ray.ObjectRef, tracker: Tracker) -> None:
        self._files = RunDir(run_dir)
        self._run_dir, self._config, self._val, self._tracker = run_dir, config, val, tracker
        self._running: tuple[int, ray.ObjectRef] | None = None
        """Step and task of the evaluation that runs."""

    def resume(self, start: int) -> None:
        """Begin those that an earlier start left without figures; the run goes on from step `start`."""
        measured = {p.step for p in read_points(self._run_dir) if any(k.startswith("val/") for k in p.values)}
        for leftover in atomic.leftovers(self._files.evaluations):
            leftover.unlink()
        for step, path in self._files.waiting_evaluations().items():
            if 0 < start >= step and step not in measured:
                self._begin(step)
            else:
                path.unlink()

    def submit(self, step: int, model: Architecture) -> None:
        """Store the weights of `step` and begin their evaluation once the one before has ended.

        Raises `RunError` where they cannot be written, and what the evaluation before has raised.
        """
        self.collect()
        checkpoint.save_weights(self._files.evaluation(step), model, self._config)
        self._begin(step)

    def collect(self, *, wait: bool = True) -> None:
        """Record the figures of the running evaluation under its step.

        Without `wait`, only if it has ended. Raises what the evaluation has raised.
        """
        if self._running is None:
            return
        step, task = self._running
        if not wait and not ray.wait([task], timeout=0)[0]:
            return
        try:
            values = ray.get(task)
        except RayTaskError as error:
            raise error.cause from None
        check_measured(self._config, values)
        self._tracker.log(step, values)
        self._running = None

    def committed(self) -> None:
        """Delete weights whose figures are in the record: a checkpoint covers it now."""
        for step, path in self._files.waiting_evaluations().items():
            if self._running is None or step != self._running[0]:
                path.unlink()

    def _begin(self, step: int) -> None:
        self.collect()
        # it claims no CPU: it waits for tasks of its own most of the time
        evaluate = ray.remote(num_cpus=0, max_retries=-1)(_evaluate)
        self._running = step, evaluate.remote(self._val, self._config, self._files.evaluation(step))


def _evaluate(val: Catalog, config: Config, weights: Path) -> dict[str, float]:
    model, _ = load_checkpoint(weights)
    chosen = range(len(val.records))[: config.evaluate.limit]
    predictions = predict_on_workers(model, val, config, chosen, config.cluster.evaluators)
    return measure(predictions, val, config).values()
