"""The figures of an evaluation from its predictions, whoever made them and in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mpformer.data.records import Catalog
from mpformer.draw import decode_png
from mpformer.evaluate.instance import ImageInstances, average_precision
from mpformer.evaluate.panoptic import Counts, count_classes, count_segments, panoptic_quality
from mpformer.evaluate.prediction import Prediction, Scores
from mpformer.evaluate.semantic import confusion, mean_iou
from mpformer.evaluate.truth import true_instances, true_segments
from mpformer.types import RunError, Task


def evaluate_predictions(
    predictions: Iterable[Prediction], catalog: Catalog, task: Task, *, boundary: bool = False
) -> dict[str, float]:
    """The figures of `score` without those per class: {"AP": ..., "PQ": ..., "mIoU": ...}, in percent."""
    return score(predictions, catalog, task, boundary=boundary).summary


def score(
    predictions: Iterable[Prediction], catalog: Catalog, task: Task, *, boundary: bool = False
) -> Scores:
    """All figures of a task, in percent, over the images that were predicted.

    instance: AP, AP50, AP75, AP_small|medium|large, AR... (`average_precision`); with `boundary` the APs by
    boundary IoU, too: AP_boundary... semantic: mIoU, pixel_accuracy, class_accuracy, and PQ_stuff, SQ_stuff,
    RQ_stuff, for which each class of an image is one segment (MaskFormer's PQ^St). panoptic: PQ, SQ, RQ, each
    with _things and _stuff, and from the same model mIoU and AP... of the things (AP^Th_pan), against the
    instance annotations where the catalog has them. A figure that is not defined is absent. Images left out
    as unusable are counted as skipped_images. The order of the predictions does not matter; an image that
    comes twice, or that the catalog does not know, raises `RunError`.
    """
    classes, things = catalog.classes, catalog.classes.thing_labels
    ordered, skipped = _in_catalog_order(predictions, catalog)
    instances: list[ImageInstances] = []
    counts = Counts.zero(len(classes))
    matrix = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for index, prediction in ordered:
        record = catalog.records[index]
        if prediction.instances is not None:
            own = record if catalog.instances is None else catalog.instances[index]
            instances.append(ImageInstances(prediction.size, true_instances(own), prediction.instances))
        if prediction.panoptic is None and prediction.semantic is None:
            continue
        truth = true_segments(record)
        if prediction.panoptic is not None:
            found = prediction.panoptic
            counts += count_segments(
                truth.ids, truth.labels, truth.crowd, decode_png(found.png), found.labels, len(classes)
            )
        if prediction.semantic is not None:
            labels, true_labels = decode_png(prediction.semantic), truth.semantic()
            matrix += confusion(true_labels, labels, len(classes))
            if prediction.panoptic is None:
                counts += count_classes(true_labels, labels, len(classes))

    scores = Scores({"skipped_images": float(skipped)} if skipped else {})
    if task in ("instance", "panoptic"):
        scores = scores.merged(average_precision(instances, classes, things))
        if boundary:
            outlines = average_precision(instances, classes, things, by_boundary=True).summary
            precision = {k.replace("AP", "AP_boundary"): v for k, v in outlines.items() if k.startswith("AP")}
            scores = scores.merged(Scores(precision))
    if task == "panoptic":
        scores = scores.merged(panoptic_quality(counts, classes, things))
    if task in ("semantic", "panoptic"):
        scores = scores.merged(mean_iou(matrix, classes))
    if task == "semantic":
        quality = panoptic_quality(counts, classes, frozenset()).summary
        scores = scores.merged(Scores({k: v for k, v in quality.items() if k.endswith("_stuff")}))
    return scores


def _in_catalog_order(
    predictions: Iterable[Prediction], catalog: Catalog
) -> tuple[list[tuple[int, Prediction]], int]:
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
