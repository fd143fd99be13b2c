"""One evaluation: predictions, metrics and layer diagnostics; with its times and memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpformer.config import Config
from mpformer.config.figures import PLAIN
from mpformer.data.records import Catalog
from mpformer.evaluate.criterion import mean_loss
from mpformer.evaluate.inference import predict_on_workers, predict_records
from mpformer.evaluate.layers import summarize
from mpformer.evaluate.metrics import build_metrics, score
from mpformer.evaluate.prediction import Prediction, Scores

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a catalog's images with their metrics."""

    catalog: Catalog
    predictions: tuple[Prediction, ...]
    scores: Scores
    layers: dict[str, float]
    """Diagnostics of the decoder layers in percent, {"layer_iou_3": 59.5, ...}."""
    losses: dict[str, float] = field(default_factory=dict)
    """With `evaluate.loss`: {"loss": 31.2, "loss_class": 0.4, ...}."""

    def values(self) -> dict[str, float]:
        """The metrics under the names that they have in a run's record: {"val/AP": ..., "diag/...": ...}."""
        return self.figures(PLAIN) | self.diagnostics()

    def diagnostics(self) -> dict[str, float]:
        """{"diag/layer_iou_3": ..., ...}"""
        return {f"diag/{name}": value for name, value in self.layers.items()}

    def figures(self, kind: str) -> dict[str, float]:
        """Metrics and losses, named as those of the weights (`PLAIN`) or of their average (`AVERAGED`)."""
        return {f"{kind}{name}": value for name, value in {**self.scores.summary, **self.losses}.items()}


@dataclass(frozen=True)
class Usage:
    """Time and memory of an evaluation."""

    images: int
    seconds: dict[str, float]
    """predict and metrics; in a single process also the stages of predict: forward, results, layers."""
    peak_memory: int
    """Largest resident memory of this process so far, in bytes."""
    peak_gpu_memory: int | None

    def facts(self) -> dict[str, str]:
        """Images per second, times and memory as text."""
        facts = {"images per second": f"{self.images / max(self.seconds['predict'], 1e-9):.2f}"}
        facts |= {f"seconds: {stage}": f"{seconds:.2f}" for stage, seconds in self.seconds.items()}
        facts["peak memory"] = f"{self.peak_memory / 2**30:.2f} GiB"
        if self.peak_gpu_memory is not None:
            facts["peak GPU memory"] = f"{self.peak_gpu_memory / 2**30:.2f} GiB"
        return facts


def measure(predictions: Iterable[Prediction], catalog: Catalog, config: Config) -> Evaluation:
    """The metrics of `predictions` that the settings ask for.

    Raises `InputError` for an unusable plug-in in `evaluate.metrics`, before any prediction is made, and
    `RunError` as `score` does.
    """
    options, metrics = config.evaluate, build_metrics(config.evaluate)
    found = tuple(predictions)
    scores = score(found, catalog, config.data.task, boundary=options.boundary, metrics=metrics)
    return Evaluation(catalog, found, scores, summarize(found), mean_loss(found))


def evaluate(
    model: Architecture,
    catalog: Catalog,
    config: Config,
    *,
    indices: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    report: Callable[[int, int, float], None] | None = None,
) -> tuple[Evaluation, Usage]:
    """Predict the images `indices` (default: the first `evaluate.limit`) of a catalog, compute the metrics.

    With `cluster.workers` above 1, Ray tasks share the images (call `ray.init` first) and the metrics are the
    same. `report` is called with (images done, of all, seconds left) after each image.
    """
    chosen = list(indices if indices is not None else range(len(catalog.records))[: config.evaluate.limit])
    seconds: dict[str, float] = {"predict": 0.0}
    if config.cluster.workers > 1:
        stream = predict_on_workers(model, catalog, config, chosen, config.cluster.workers)
    else:
        stream = predict_records(model, catalog, config, chosen, device, seconds)
    start = time.perf_counter()

    def timed() -> Iterator[Prediction]:
        for done, prediction in enumerate(stream, 1):
            yield prediction
            seconds["predict"] = time.perf_counter() - start
            if report:
                report(done, len(chosen), seconds["predict"] / done * (len(chosen) - done))

    found = measure(timed(), catalog, config)
    seconds["metrics"] = time.perf_counter() - start - seconds["predict"]
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return found, Usage(len(found.predictions), seconds, peak_memory(), gpu)


def peak_memory() -> int:
    """Largest resident memory of this process so far, or since `summary.forget_other_runs`, in bytes."""
    with contextlib.suppress(OSError):  # Linux's own count, which can begin anew
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
