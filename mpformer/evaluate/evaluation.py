"""One whole evaluation: predictions, figures, diagnostics, times and memory, and its page."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpformer.config import Config
from mpformer.data.records import Catalog
from mpformer.evaluate.inference import predict_on_workers, predict_records
from mpformer.evaluate.layers import summarize
from mpformer.evaluate.metrics import score
from mpformer.evaluate.pages import write_page
from mpformer.evaluate.prediction import Prediction, Scores
from mpformer.types import Task

if TYPE_CHECKING:
    from mpformer.model.segmenter import Segmenter


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, and what it took."""

    task: Task
    predictions: tuple[Prediction, ...]
    scores: Scores
    layers: dict[str, float]
    """Diagnostics of the decoder's layers, {"layer_iou_3": 59.5, ...}."""
    seconds: dict[str, float]
    """predict (all stages), metrics, and within predict forward, results, layers if one process predicted."""
    peak_memory: int
    """Most bytes of main memory that this process has held."""
    peak_gpu_memory: int | None

    def facts(self) -> dict[str, str]:
        """Images per second, times and memory in words."""
        images = len(self.predictions)
        facts = {"images per second": f"{images / max(self.seconds['predict'], 1e-9):.2f}"}
        facts |= {f"seconds: {stage}": f"{seconds:.2f}" for stage, seconds in self.seconds.items()}
        facts["peak memory"] = f"{self.peak_memory / 2**30:.2f} GiB"
        if self.peak_gpu_memory is not None:
            facts["peak GPU memory"] = f"{self.peak_gpu_memory / 2**30:.2f} GiB"
        return facts

    def write(self, folder: Path, title: str, catalog: Catalog, count: int) -> list[Path]:
        """The page and its pictures; see `pages.write_page`."""
        return write_page(
            folder,
            title,
            self.predictions,
            catalog,
            self.task,
            self.scores,
            count=count,
            facts=self.facts() | {name: f"{value:.1f}" for name, value in self.layers.items()},
        )


def evaluate(
    model: Segmenter,
    catalog: Catalog,
    config: Config,
    *,
    indices: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    report: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Predict the images `indices` (default: the first `evaluate.limit`) of a catalog and measure.

    With `cluster.workers` above 1, Ray tasks share the images (`ray.init` first); the figures are the same.
    `report` is told (images done, of all, seconds left) after each image.
    """
    chosen = list(indices if indices is not None else range(len(catalog.records))[: config.evaluate.limit])
    seconds: dict[str, float] = {"predict": 0.0}
    if config.cluster.workers > 1:
        stream = predict_on_workers(model, catalog, config, chosen, config.cluster.workers)
    else:
        stream = predict_records(model, catalog, config, chosen, device, seconds)
    predictions = []
    start = time.perf_counter()
    for prediction in stream:
        predictions.append(prediction)
        seconds["predict"] = time.perf_counter() - start
        if report:
            left = seconds["predict"] / len(predictions) * (len(chosen) - len(predictions))
            report(len(predictions), len(chosen), left)
    start = time.perf_counter()
    scores = score(predictions, catalog, config.data.task, boundary=config.evaluate.boundary)
    layers = summarize(predictions)
    seconds["metrics"] = time.perf_counter() - start
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Evaluation(config.data.task, tuple(predictions), scores, layers, seconds, _peak_memory(), gpu)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
