"""DETR's panoptic post-processing: the row "MaskFormer (DETR)" of MaskFormer's Table 3."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from mpformer.evaluate.postprocess import Panoptic, View

MIN_PIXELS = 5
"""Smaller segments are removed."""


def detr_panoptic(
    views: Sequence[View], *, class_confidence: float = 0.85, thing_labels: Set[int]
) -> Panoptic:
    """Assign each pixel to the query with the largest mask logit (mean of the views).

    Query q is the same object in all views. Queries whose best class is no-object, or not above
    `class_confidence`, are dropped; those of one stuff class are one segment, scored by its best query.
    Small segments are removed and their pixels reassigned until none is left. No pixel is void unless all
    queries are dropped. (DETR's evaluation code; Carion et al., section 4.4, describes it.)
    """
    probabilities = torch.stack([v.class_probabilities() for v in views]).mean(0)
    scores, labels = probabilities.max(-1)
    kept = (labels < probabilities.shape[-1] - 1) & (scores > class_confidence)
    height, width = views[0].sizes.original
    masks = torch.stack([view.upsampler(kept)(slice(0, height)) for view in views]).mean(0)
    scores, labels = scores[kept], labels[kept]
    while len(labels):
        owner = _first_of_stuff(labels, thing_labels)[masks.max(1).indices]  # [h,w] query
        areas = torch.bincount(owner.flatten(), minlength=len(labels))
        # all queries of a stuff class are kept or removed together
        stays = areas[_first_of_stuff(labels, thing_labels)] >= MIN_PIXELS
        if stays.all():
            return _segments(owner, labels, scores, thing_labels)
        masks, labels, scores = masks[:, stays], labels[stays], scores[stays]
    return Panoptic(torch.zeros(height, width, dtype=torch.int64, device=scores.device), (), ())


def _first_of_stuff(labels: Tensor, thing_labels: Set[int]) -> Tensor:
    """Index [n] of the query that owns each query's pixels: itself, or for stuff the first of its class."""
    first: dict[int, int] = {}
    owners = [
        i if label in thing_labels else first.setdefault(label, i) for i, label in enumerate(labels.tolist())
    ]
    return torch.tensor(owners, device=labels.device)


def _segments(owner: Tensor, labels: Tensor, scores: Tensor, thing_labels: Set[int]) -> Panoptic:
    """The segmentation from the query [h,w] that owns each pixel."""
    best = scores.clone()
    best.scatter_reduce_(0, _first_of_stuff(labels, thing_labels), scores, "amax")
    present, ids = owner.unique(return_inverse=True)
    return Panoptic(ids + 1, tuple(labels[present].tolist()), tuple(best[present].tolist()))
