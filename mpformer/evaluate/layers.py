"""What the decoder's layers agree on: the definitions, for one image (MP-Former section 3).

mIoU-L^i: mean IoU of the masks that one query predicts before and after layer i (Eq. 1). Util^i: share of
the objects that are matched to the same query after layer i as after the last layer (Eq. 3). Both are means
over queries or objects of an image, then over images, in percent. Layers count from 1; head 0 stands before
layer 1. Padding is left out; objects are matched on full masks at stride 4, so that nothing is random.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Model as ModelConfig
from mpformer.evaluate.postprocess import Sizes
from mpformer.evaluate.prediction import Figures, Prediction
from mpformer.model.matcher import Match, match
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Target


def layer_iou(mask_logits: Sequence[Tensor]) -> list[float]:
    """IoU of consecutive heads' masks, mean over queries: one number per pair of neighbours.

    Each [Q,h,w] logits, foreground from 0 up (probability 0.5). Two empty masks agree: 1.
    """
    masks = [(logits >= 0).flatten(1) for logits in mask_logits]
    areas = [mask.sum(1, dtype=torch.int32) for mask in masks]  # summing into int64 takes ten times as long
    values = []
    for i, (before, after) in enumerate(itertools.pairwise(masks)):
        overlap = (before & after).sum(1, dtype=torch.int32)
        union = areas[i] + areas[i + 1] - overlap
        values.append(torch.where(union > 0, overlap / union.clamp(min=1), 1.0).mean())
    return [float(v) for v in values]


def query_utilization(matches: Sequence[Match]) -> list[float] | None:
    """Share of the last match's pairs that each match has, too. None where nothing is matched.

    Without more objects than queries this is Eq. 3; with more, the unmatched ones do not count.
    """
    pairs = [set(zip(m.queries.tolist(), m.objects.tolist())) for m in matches]
    if not pairs[-1]:
        return None
    return [len(p & pairs[-1]) / len(pairs[-1]) for p in pairs]


def attention_inside(weights: Tensor, masks: Tensor, matched: Match, strides: Sequence[int]) -> float | None:
    """Share of the attention that a matched query pays to its object, mean over the matched queries.

    `weights` [Q,S] rows summing to 1, over the cells of the maps at `strides`; `masks` [N,H,W] bool. A cell
    that the object covers in part counts in part. None where nothing is matched.
    """
    if not len(matched.queries):
        return None
    coverage = torch.cat([F.avg_pool2d(masks[:, None].float(), s).flatten(1) for s in strides], dim=1)
    inside = (weights[matched.queries] * coverage[matched.objects]).sum(1)
    return float(inside.mean())


def layer_figures(
    heads: Sequence[Head], target: Target, sizes: Sizes, config: ModelConfig, prefix: str = ""
) -> tuple[Figures, Match]:
    """mIoU-L and Util of one image's heads (last one last) and the last head's match."""
    heads, target = without_padding(heads, target, sizes)
    numbers = layer_numbers(heads, config)
    ious = layer_iou([head.mask_logits[0] for head in heads])
    figures: Figures = {f"{prefix}layer_iou": dict(zip(numbers[1:], ious))}
    matches = [_match(head, target, config) for head in heads]
    used = query_utilization(matches)
    if used is not None:
        figures[f"{prefix}query_utilization"] = {i: u for i, u in zip(numbers, used) if i > 0}
    return figures, matches[-1]


def without_padding(heads: Sequence[Head], target: Target, sizes: Sizes) -> tuple[tuple[Head, ...], Target]:
    """Heads and target cut to the cells whose centre lies in the image."""
    height, width = (max(1, (edge + 1) // 4) for edge in sizes.valid)
    cut = tuple(Head(h.class_logits, h.mask_logits[:, :, :height, :width]) for h in heads)
    return cut, Target(target.labels, target.masks[:, : 4 * height, : 4 * width])


def layer_numbers(heads: Sequence[Head], config: ModelConfig) -> list[int]:
    """The layer after which each head stands; 0 is before layer 1."""
    last = config.decoder.layers
    return list(range(last + 1 - len(heads), last + 1))


def _match(head: Head, target: Target, config: ModelConfig) -> Match:
    """By full masks: deterministic."""
    full_masks = {"points": None, "match_points": "as_loss", "match_by": "masks", "padding": "counted"}
    loss = config.loss.model_copy(update=full_masks)
    draws = SampleRandom(0, "diagnostics", [0], head.mask_logits.device)  # none is drawn
    return match(head, [target], loss, draws, [target.masks.shape[1:]], [""])[0]


def means(figures: Iterable[Figures]) -> Figures:
    """Means in percent over images; an image without a figure (no objects) takes no part in it."""
    values: dict[str, dict[int, list[float]]] = {}
    for one in figures:
        for name, layers in one.items():
            for layer, value in layers.items():
                values.setdefault(name, {}).setdefault(layer, []).append(value)
    return {
        name: {layer: 100 * sum(v) / len(v) for layer, v in sorted(layers.items())}
        for name, layers in values.items()
    }


def summarize(predictions: Iterable[Prediction]) -> dict[str, float]:
    """{"layer_iou_3": 59.5, "query_utilization_3": 70.8, ...} of predictions made with `evaluate.layers`."""
    ordered = sorted((p for p in predictions if p.layers is not None), key=lambda p: p.image_id)
    return flat(means(p.layers for p in ordered))


def flat(figures: Figures) -> dict[str, float]:
    """{"layer_iou_3": 59.5, ...}"""
    return {f"{name}_{layer}": v for name, layers in figures.items() for layer, v in layers.items()}
