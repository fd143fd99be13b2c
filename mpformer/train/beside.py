"""Evaluation beside training: Ray tasks measure the weights of a step while training goes on.

The weights of an evaluation lie in `RUN/evaluations/step-00000400.safetensors` from its step until a
checkpoint covers its figures. A run that was cut off in between finds them there and measures them then: no
point is missing, none is double. One evaluation is under way at a time; where it takes longer than training
takes to the next, training waits for it.
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
from mpformer.model.segmenter import Segmenter
from mpformer.model.weights.loading import load_checkpoint
from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir
from mpformer.tracking.tracker import Tracker
from mpformer.train import checkpoint


class Beside:
    """The evaluations of one start of a run. One process only: rank 0."""

    def __init__(self, run_dir: Path, config: Config, val: ray.ObjectRef, tracker: Tracker) -> None:
        self._files = RunDir(run_dir)
        self._run_dir, self._config, self._val, self._tracker = run_dir, config, val, tracker
        self._step = 0
        self._task: ray.ObjectRef | None = None

    def resume(self, start: int) -> None:
        """Begin what an earlier start of the run left without figures; `start`: the step it goes on from."""
        measured = {p.step for p in read_points(self._run_dir) if any(k.startswith("val/") for k in p.values)}
        for leftover in atomic.leftovers(self._files.evaluations):
            leftover.unlink()
        for step, path in self._files.waiting_evaluations().items():
            if 0 < start >= step and step not in measured:
                self._begin(step)
            else:
                path.unlink()

    def submit(self, step: int, model: Segmenter) -> None:
        """Keep the weights of `step` and begin to measure them, after those before.

        Raises `RunError` where the disk refuses, and what the evaluation before has raised.
        """
        self.collect()
        checkpoint.save_weights(self._files.evaluation(step), model, self._config)
        self._begin(step)

    def collect(self, *, wait: bool = True) -> None:
        """Write the figures of the evaluation that is under way to the record under its step.

        Without `wait`, only if they are there. Raises what the evaluation has raised.
        """
        if self._task is None or not (wait or ray.wait([self._task], timeout=0)[0]):
            return
        try:
            self._tracker.log(self._step, ray.get(self._task))
        except RayTaskError as error:
            raise error.cause from None
        self._task = None

    def committed(self) -> None:
        """A checkpoint covers what is in the record: those weights are not needed any more."""
        for step, path in self._files.waiting_evaluations().items():
            if self._task is None or step != self._step:
                path.unlink()

    def _begin(self, step: int) -> None:
        self.collect()
        # it waits for its own tasks, and then counts for some seconds
        measure = ray.remote(num_cpus=0, max_retries=-1)(_measure)
        self._step, self._task = step, measure.remote(self._val, self._config, self._files.evaluation(step))


def _measure(val: Catalog, config: Config, weights: Path) -> dict[str, float]:
    model, _ = load_checkpoint(weights)
    chosen = range(len(val.records))[: config.evaluate.limit]
    predictions = predict_on_workers(model, val, config, chosen, config.cluster.evaluators)
    return measure(predictions, val, config).values()
