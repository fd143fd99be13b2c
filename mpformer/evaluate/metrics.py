"""The metrics of an evaluation from its predictions, in any order; and the contract of a metric plug-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from mpformer.config import Evaluate
from mpformer.data.records import Catalog
from mpformer.draw import decode_png
from mpformer.evaluate.instance import ImageInstances, average_precision
from mpformer.evaluate.panoptic import Counts, count_classes, count_segments, panoptic_quality
from mpformer.evaluate.prediction import Prediction, Scores
from mpformer.evaluate.semantic import confusion, mean_iou
from mpformer.evaluate.truth import Truth
from mpformer.plugin import build, described
from mpformer.types import RunError, Task


class Metric(Protocol):
    """A metric named in `evaluate.metrics`. Each evaluation makes a new one, with the plug-in's options."""

    def update(self, prediction: Prediction, truth: Truth) -> None:
        """Add one image. Images come in the order of the data set; unusable ones are left out."""

    def compute(self) -> dict[str, float]:
        """The values over all images by name: `val/NAME` in the record of a run. NaN: undefined, left out."""


def build_metrics(options: Evaluate) -> dict[str, Metric]:
    """New metrics of `evaluate.metrics`, keyed by their names in messages; `InputError` for a bad one."""
    keys = [f"evaluate.metrics.{index}" for index in range(len(options.metrics))]
    return {
        f"{key}: {plugin.kind}": build(plugin.kind, plugin.options, Metric, key)
        for key, plugin in zip(keys, options.metrics)
    }


_OF_OBJECTS = {
    "AP": "there is no object",
    "AP_small": "there is no object below 32x32 pixels",
    "AP_medium": "there is no object from 32x32 to 96x96 pixels",
    "AP_large": "there is no object above 96x96 pixels",
}
_OF_PIXELS = {"mIoU": "no pixel has a class", "PQ_stuff": "no stuff occurs"}
_OF_SEGMENTS = {"PQ": "there is no segment", "PQ_things": "no countable class occurs"}
_EXPECTED: dict[str, dict[str, str]] = {
    "instance": _OF_OBJECTS,
    "semantic": _OF_PIXELS,
    "panoptic": _OF_SEGMENTS | _OF_PIXELS | _OF_OBJECTS,
}
"""Metrics of each task, and why one of them may be undefined."""


def unmeasured(task: Task, measured: Iterable[str]) -> dict[str, str]:
    """The task's metrics that are not among those `measured`, and why: {"AP_large": "there is no ..."}."""
    known = set(measured)
    return {name: reason for name, reason in _EXPECTED[task].items() if name not in known}


def evaluate_predictions(
    predictions: Iterable[Prediction], catalog: Catalog, task: Task, *, boundary: bool = False
) -> dict[str, float]:
    """The summary of `score`: {"AP": ..., "PQ": ..., "mIoU": ...}, in percent."""
    return score(predictions, catalog, task, boundary=boundary).summary


def score(
    predictions: Iterable[Prediction],
    catalog: Catalog,
    task: Task,
    *,
    boundary: bool = False,
    metrics: Mapping[str, Metric] | None = None,
) -> Scores:
    """All metrics of a task, in percent, over the predicted images.

    instance: AP, AP50, AP75, AP_small|medium|large, AR... (`average_precision`); with `boundary` also
    AP_boundary..., by boundary IoU. semantic: mIoU, pixel_accuracy, class_accuracy, and PQ_stuff, SQ_stuff,
    RQ_stuff, where each class of an image is one segment (MaskFormer's PQ^St). panoptic: PQ, SQ, RQ, each
    with _things and _stuff, and from the same model mIoU and AP... of the things (AP^Th_pan), against the
    instance annotations where the catalog has them. `metrics` adds the values of plug-ins, keyed by what
    error messages call them. An undefined metric is absent. Unusable images are counted as skipped_images.
    The order of the predictions does not matter. Raises `RunError` for an image that is predicted twice or
    missing from the catalog, and for a plug-in that returns a name twice or a value that is no number.
    """
    classes, things = catalog.classes, catalog.classes.thing_labels
    plugins = metrics or {}
    ordered, skipped = _in_catalog_order(predictions, catalog)
    instances: list[ImageInstances] = []
    counts = Counts.zero(len(classes))
    matrix = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for index, prediction in ordered:
        own = None if catalog.instances is None else catalog.instances[index]
        truth = Truth(catalog.records[index], classes, own)
        for place, metric in plugins.items():
            _called(place, metric.update, prediction, truth)
        if prediction.instances is not None:
            instances.append(ImageInstances(prediction.size, truth.instances, prediction.instances))
        if prediction.panoptic is not None:
            true, found = truth.segments, prediction.panoptic
            counts += count_segments(
                true.ids, true.labels, true.crowd, found.ids(), found.labels, len(classes)
            )
        if prediction.semantic is not None:
            labels = decode_png(prediction.semantic)
            matrix += confusion(truth.labels, labels, len(classes))
            if prediction.panoptic is None:
                counts += count_classes(truth.labels, labels, len(classes))

    scores = Scores({"skipped_images": float(skipped)} if skipped else {})
    if task in ("instance", "panoptic"):
        scores = scores.merged(average_precision(instances, classes, things))
        if boundary:
            by_boundary = average_precision(instances, classes, things, by_boundary=True).summary
            precision = {k.replace("AP", "AP_boundary"): v for k, v in by_boundary.items() if k[:2] == "AP"}
            scores = scores.merged(Scores(precision))
    if task == "panoptic":
        scores = scores.merged(panoptic_quality(counts, classes, things))
    if task in ("semantic", "panoptic"):
        scores = scores.merged(mean_iou(matrix, classes))
    if task == "semantic":
        quality = panoptic_quality(counts, classes, frozenset()).summary
        scores = scores.merged(Scores({k: v for k, v in quality.items() if k.endswith("_stuff")}))
    for place, metric in plugins.items():
        scores = scores.merged(Scores(_plugin_values(place, metric, scores.summary)))
    return scores


def _called(place: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of a metric from outside returns; `RunError` for whatever it raises."""
    try:
        return method(*arguments)
    except Exception as error:  # the metric's own code may raise anything
        raise RunError(f"{place}: {described(error)}") from error


def _plugin_values(place: str, metric: Metric, known: Mapping[str, float]) -> dict[str, float]:
    values: dict[str, float] = {}
    computed = _called(place, metric.compute)
    if not isinstance(computed, Mapping):
        raise RunError(f"{place}: `compute` must return values by name, not {computed!r}")
    for name, value in computed.items():
        if not isinstance(name, str) or not name:
            raise RunError(f"{place}: the name of a value must be a text, not {name!r}")
        if name in known:
            raise RunError(f"{place}: there is a metric '{name}' already; return another name")
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            raise RunError(f"{place}: the value of '{name}' must be a number, not {value!r}") from None
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _in_catalog_order(
    predictions: Iterable[Prediction], catalog: Catalog
) -> tuple[list[tuple[int, Prediction]], int]:
    """Usable predictions with their index in the catalog, and the number of unusable ones."""
    index_of = {record.image_id: i for i, record in enumerate(catalog.records)}
    found: dict[int, Prediction] = {}
    for prediction in predictions:
        index = index_of.get(prediction.image_id)
        if index is None:
            raise RunError(f"evaluation: image {prediction.image_id} is not in {catalog.name}")
        if index in found:
            raise RunError(f"evaluation: image {prediction.image_id} was predicted twice")
        found[index] = prediction
    usable = [(i, found[i]) for i in sorted(found) if not found[i].problem]
    return usable, len(found) - len(usable)
