"""Consistency of the decoder layers: definitions for one image (MP-Former section 3).

mIoU-L^i: mean IoU of the masks that a query predicts before and after layer i (Eq. 1). Util^i: fraction of
the objects that are matched to the same query after layer i as after the last layer (Eq. 3). Both are means
over the queries or objects of an image, then over images, in percent. Layers count from 1; head 0 is before
layer 1. Padding is cropped; objects are matched on full masks at stride 4, so the result is deterministic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss
from mpformer.evaluate.postprocess import Sizes
from mpformer.evaluate.prediction import LayerMetrics, Prediction
from mpformer.model.architecture import Architecture
from mpformer.model.matcher import Match, match
from mpformer.model.objects import in_a_row
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Target


def layer_iou(mask_logits: Sequence[Tensor]) -> list[float]:
    """IoU of consecutive heads' masks, mean over queries: one number per pair of heads.

    Each [Q,h,w] logits, foreground from 0 (probability 0.5). The IoU of two empty masks is 1.
    """
    masks = [(logits >= 0).flatten(1) for logits in mask_logits]
    areas = [mask.sum(1, dtype=torch.int32) for mask in masks]  # int64 sums take ten times as long
    values = []
    for i, (before, after) in enumerate(itertools.pairwise(masks)):
        overlap = (before & after).sum(1, dtype=torch.int32)
        union = areas[i] + areas[i + 1] - overlap
        values.append(torch.where(union > 0, overlap / union.clamp(min=1), 1.0).mean())
    return [float(v) for v in values]


def query_utilization(matches: Sequence[Match]) -> list[float]:
    """Fraction of the last match's pairs that each match contains; empty where nothing is matched.

    This is Eq. 3, except that with more objects than queries the unmatched objects are left out.
    """
    pairs = [set(zip(m.queries.tolist(), m.objects.tolist())) for m in matches]
    if not pairs[-1]:
        return []
    return [len(p & pairs[-1]) / len(pairs[-1]) for p in pairs]


def attention_inside(weights: Tensor, masks: Tensor, matched: Match, strides: Sequence[int]) -> float | None:
    """Fraction of a query's attention that falls inside its object, mean over the matched queries.

    `weights` [Q,S]: rows sum to 1, over the cells of the feature maps at `strides`; `masks` [N,H,W] bool. A
    cell counts by the fraction that the object covers. None where nothing is matched.
    """
    if not len(matched.queries):
        return None
    coverage = torch.cat([F.avg_pool2d(masks[:, None].float(), s).flatten(1) for s in strides], dim=1)
    inside = (weights[matched.queries] * coverage[matched.objects]).sum(1)
    return float(inside.mean())


def layer_metrics(
    heads: Sequence[Head], target: Target, sizes: Sizes, model: Architecture, prefix: str = ""
) -> tuple[LayerMetrics, Match]:
    """mIoU-L and Util of one image's heads (last one last), and the match of the last head."""
    heads, target = without_padding(heads, target, sizes)
    numbers = model.structure.layers_of(len(heads))
    ious = layer_iou([head.mask_logits[0] for head in heads])
    metrics: LayerMetrics = {f"{prefix}layer_iou": dict(zip(numbers[1:], ious))}
    matches = [_match(head, target, model.config.loss) for head in heads]
    if utilization := query_utilization(matches):
        metrics[f"{prefix}query_utilization"] = {i: u for i, u in zip(numbers, utilization) if i > 0}
    return metrics, matches[-1]


def without_padding(heads: Sequence[Head], target: Target, sizes: Sizes) -> tuple[tuple[Head, ...], Target]:
    """Heads and target cropped to the cells whose centre lies in the image."""
    height, width = (max(1, (edge + 1) // 4) for edge in sizes.valid)
    cropped = tuple(Head(h.class_logits, h.mask_logits[:, :, :height, :width]) for h in heads)
    return cropped, Target(target.labels, target.masks[:, : 4 * height, : 4 * width])


def _match(head: Head, target: Target, config: Loss) -> Match:
    """Match on full masks instead of sampled points."""
    full_masks = {"points": None, "match_points": "as_loss", "match_by": "masks", "padding": "counted"}
    loss = config.model_copy(update=full_masks)
    draws = SampleRandom(0, [0], head.mask_logits.device)  # unused
    return match(head, in_a_row([target]), loss, draws, [""])[0]


def mean_over_images(metrics: Iterable[LayerMetrics]) -> LayerMetrics:
    """Means in percent; an image where a metric is undefined (no objects) is left out of its mean."""
    values: dict[str, dict[int, list[float]]] = {}
    for one in metrics:
        for name, layers in one.items():
            for layer, value in layers.items():
                values.setdefault(name, {}).setdefault(layer, []).append(value)
    return {
        name: {layer: 100 * sum(v) / len(v) for layer, v in sorted(layers.items())}
        for name, layers in values.items()
    }


def summarize(predictions: Iterable[Prediction]) -> dict[str, float]:
    """{"layer_iou_3": 59.5, "query_utilization_3": 70.8, ...} of predictions made with `evaluate.layers`."""
    layers = {p.image_id: p.layers for p in predictions if p.layers is not None}
    return flatten(mean_over_images(layers[image_id] for image_id in sorted(layers)))


def flatten(metrics: LayerMetrics) -> dict[str, float]:
    """{"layer_iou_3": 59.5, ...}"""
    return {f"{name}_{layer}": v for name, layers in metrics.items() for layer, v in layers.items()}
