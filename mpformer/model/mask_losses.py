"""Mask and dice losses of pairs of a predicted and a true mask, on sampled points or on full masks.

On sampled points (PointRend's importance sampling, Mask2Former section 3.3) each pair has points of its own,
or shares those of its object (`loss.shared_pilot_points`). Where there is a compiled form it does all heads
and images at once (`mpformer.ops.mask_points`); the form here, which defines it, goes head by head to spare
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.config.model import PointCounts
from mpformer.model.matcher import FOCAL_ALPHA, FOCAL_GAMMA
from mpformer.model.pairs import Pairs
from mpformer.model.points import (
    at_least_float32,
    cell_centers,
    inside,
    least_certain,
    sample,
    sample_masks,
)
from mpformer.model.streams import Draws
from mpformer.model.transfer import to_device
from mpformer.ops import mask_points
from mpformer.ops.mask_points import MaskPairs


def mask_losses(
    maps: Sequence[Tensor],
    masks: Tensor,
    pairs: Pairs,
    limits: np.ndarray,
    config: LossConfig,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums over the pairs of each head of the mean mask loss and of the dice loss: two times [L].

    maps: of each head [B,Q,h,w] logits; masks [M,H,W] bool, of which `pairs.objects` are rows; limits [B,2]
    as in `Objects`. shared: pairs with the same `pairs.rows` share their points.
    """
    counted = None
    if config.padding == "ignored":
        counted = to_device(torch.from_numpy(limits), masks.device)[pairs.images]
    counts = config.point_counts()
    if counts is not None and config.mask_loss == "cross_entropy" and mask_points.has_kernel(maps[0]):
        cross_entropy, dice = _compiled(maps, masks, pairs, counted, counts, shared)
    else:
        points = _shared_points(maps, pairs, counts) if shared and counts else None
        each = [_of_head(i, maps[i], masks, pairs, counted, config, points) for i in range(len(maps))]
        cross_entropy, dice = (torch.cat(values) for values in zip(*each))
    return pairs.sums(cross_entropy), pairs.sums(dice)


def _compiled(
    maps: Sequence[Tensor],
    masks: Tensor,
    pairs: Pairs,
    limits: Tensor | None,
    counts: PointCounts,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    columns = (pairs.heads, pairs.images, pairs.queries, pairs.objects, pairs.rows)
    table = torch.stack(columns, dim=1).int()
    points = mask_points.Points(counts.candidates, counts.important, counts.uniform)
    streams = pairs.draws.streams
    kept = None
    if shared:
        kept = mask_points.least_certain(_sums_by_row(maps, pairs), streams, points)
    return mask_points.mask_point_losses(maps, MaskPairs(table, masks, streams, limits, kept), points)


def _of_head(
    head: int,
    maps: Tensor,
    masks: Tensor,
    pairs: Pairs,
    limits: Tensor | None,
    config: LossConfig,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mask and dice loss of each pair of a head; shared: the points of each row, [r,P,2]."""
    own = pairs.of_head(head)
    logits = at_least_float32(_Selection.apply(maps, pairs.images[own], pairs.queries[own]))
    objects, counts = pairs.objects[own], config.point_counts()
    if counts is None:
        # full masks: predictions raised to the ground truth's size
        size = masks.shape[1:]
        predicted = _resized(logits, size).flatten(1)
        wanted = masks[objects].flatten(1).to(logits.dtype)
        points = cell_centers(size, logits.device)
    else:
        rows = pairs.rows[own]
        points = _points(logits, pairs.draws.some(rows), counts) if shared is None else shared[rows]
        predicted, wanted = sample(logits, points), sample_masks(masks, objects, points.to(logits.dtype))
    counted = None if limits is None else inside(points, limits[own, None]).to(logits.dtype)
    return pointwise_mask_loss(predicted, wanted, counted, config), dice_loss(predicted, wanted, counted)


def _points(logits: Tensor, draws: Draws, counts: PointCounts) -> Tensor:
    """[n,P,2]: of each map's random candidates the least certain ones, then uniform points."""
    kept = least_certain(logits.detach(), draws.points(counts.candidates), counts.important)
    return torch.cat((kept, draws.points(counts.uniform)), dim=1)


def _shared_points(maps: Sequence[Tensor], pairs: Pairs, counts: PointCounts) -> Tensor:
    return _points(_sums_by_row(maps, pairs), pairs.draws.some(slice(None)), counts)


@torch.no_grad()
def _sums_by_row(maps: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """[r,h,w]: the sum of the logits of all pairs that share a row of points.

    It is as uncertain as their mean, as every group holds every object once.
    """
    sums = at_least_float32(maps[0].new_zeros(len(pairs.draws), *maps[0].shape[2:]))
    for head, of_head in enumerate(maps):
        own = pairs.of_head(head)
        logits = of_head[pairs.images[own], pairs.queries[own]]
        sums.index_add_(0, pairs.rows[own], logits.to(sums.dtype))
    return sums


class _Selection(torch.autograd.Function):
    """The maps of some queries, each at most once: [B,Q,h,w] -> [n,h,w].

    The gradient is written once; that of an indexing adds to its place, for which a GPU sorts the indices.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, images: Tensor, queries: Tensor) -> Tensor:
        ctx.shape = maps.shape
        ctx.save_for_backward(images, queries)
        return maps[images, queries]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.saved_tensors] = grad
        return whole, None, None


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Maps raised to a size, [n,h,w] -> [n,H,W]."""
    if len(logits) == 0:
        return logits.new_zeros(0, *size) + logits.sum()  # stays part of the graph
    return F.interpolate(logits[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def pointwise_mask_loss(logits: Tensor, wanted: Tensor, counted: Tensor | None, config: LossConfig) -> Tensor:
    """Mean binary cross-entropy, or focal loss, of each mask over its (counted) points: [...,P] -> [...].

    counted: 0 or 1, broadcast; None: all points count.
    """
    values = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if config.mask_loss == "focal":
        # exp(-cross-entropy) is the probability of what is wanted
        balance = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
        values = balance * (1 - (-values).exp()) ** FOCAL_GAMMA * values
    if counted is None:
        return values.mean(-1)
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def dice_loss(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """Dice loss of each mask, smoothed by 1: [...,P] -> [...]; counted as in `pointwise_mask_loss`."""
    probability = logits.sigmoid()
    if counted is not None:
        probability, wanted = probability * counted, wanted * counted
    overlap = 2 * (probability * wanted).sum(-1)
    return 1 - (overlap + 1) / (probability.sum(-1) + wanted.sum(-1) + 1)
