"""Bipartite matching of predictions to ground truth (Mask2Former section 3.3; DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from mpformer.config_model import Loss as LossConfig
from mpformer.model.boxes import generalized_iou, relative_boxes
from mpformer.model.points import at_least_float32, cell_centers, inside, sample
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Pilots, RunError, Target

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
"""Of the focal loss (Lin et al. 2017), as DETR and MaskFormer use it."""


class NonFiniteError(RunError):
    """A number that must be finite is not: the run stops before the optimiser."""


@dataclass(frozen=True)
class Match:
    """The pairs of one image: query `queries[i]` predicts object `objects[i]`; both int64 on the CPU."""

    queries: Tensor
    objects: Tensor


@torch.no_grad()
def match(
    head: Head,
    targets: Sequence[Target],
    config: LossConfig,
    draws: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
    image_ids: Sequence[str],
) -> list[Match]:
    """The cheapest assignment of each image's objects to distinct queries; min(Q, N) pairs.

    Cost: class (minus the probability of the object's class), mask (binary cross-entropy or focal loss) and
    dice, weighted as in the loss, on points that all queries and objects of an image share; by boxes: class,
    L1 distance and generalised IoU. A fixed assignment costs nothing: class k to query k. Raises
    `NonFiniteError` naming the image where a cost is not finite.
    """
    if config.assignment == "fixed":
        return [Match(t.labels.cpu(), torch.arange(len(t.labels))) for t in targets]
    config = config.for_matching()
    matches = []
    for b, target in enumerate(targets):
        cost = _cost(head, b, target, config, draws, valid_sizes[b]).cpu()
        if not torch.isfinite(cost).all():
            raise NonFiniteError(f"matching: a cost of image {image_ids[b]} is not finite")
        queries, objects = linear_sum_assignment(cost.numpy())
        matches.append(Match(torch.from_numpy(queries), torch.from_numpy(objects)))
    return matches


@torch.no_grad()
def match_pilots(
    head: Head,
    pilots: Pilots,
    targets: Sequence[Target],
    config: LossConfig,
    draws: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
    image_ids: Sequence[str],
) -> Tensor:
    """The object of each pilot slot when each group is matched to its own objects, [B,P] int64.

    MP-Former Table 9, "match". Raises `NonFiniteError` as `match` does.
    """
    config = config.for_matching()
    matched = pilots.objects.clone()
    for b, (target, count) in enumerate(zip(targets, pilots.counts)):
        if count == 0:
            continue
        per_group = min(len(target.labels), count)
        cost = _cost(head, b, target, config, draws, valid_sizes[b])[:count]
        cost = cost.gather(1, pilots.objects[b, :per_group].expand(count, -1)).cpu()
        if not torch.isfinite(cost).all():
            raise NonFiniteError(f"matching of pilots: a cost of image {image_ids[b]} is not finite")
        chosen = [linear_sum_assignment(group.numpy())[1] for group in cost.split(per_group)]
        order = torch.from_numpy(np.concatenate(chosen)).to(matched.device)
        matched[b, :count] = pilots.objects[b, :per_group][order]
    return matched


def most_alike(similarity: Tensor) -> Tensor:
    """The one-to-one assignment of columns to rows with the largest sum: [Q,Q] -> [Q] int64, row by row."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(similarity.device)


def _cost(
    head: Head,
    b: int,
    target: Target,
    config: LossConfig,
    draws: SampleRandom,
    valid_size: tuple[int, int],
) -> Tensor:
    """[Q,N] float32."""
    class_cost = -at_least_float32(head.class_logits[b]).softmax(-1)[:, target.labels]
    if config.match_by == "boxes":
        predicted = at_least_float32(head.boxes[b])[:, None]
        wanted = relative_boxes(target.masks).to(predicted.dtype)[None]
        return (
            config.class_weight * class_cost
            + config.box_weight * (predicted - wanted).abs().sum(2)
            - config.giou_weight * generalized_iou(predicted, wanted)
        )
    size = target.masks.shape[1:]
    logits = at_least_float32(head.mask_logits[b])
    if config.points is None:
        points = cell_centers(*logits.shape[1:], logits.device)
        predicted = logits.flatten(1)  # at their own centres
    else:
        points = draws.uniform(b, config.points, 2)
        predicted = sample(logits, points.expand(len(logits), -1, -1))
    wanted = sample(target.masks.to(logits.dtype), points.expand(len(target.masks), -1, -1))
    counted = inside(points, valid_size, size).to(logits.dtype) if config.padding == "ignored" else None
    mask_cost = _focal_cost if config.mask_loss == "focal" else _cross_entropy_cost
    return (
        config.class_weight * class_cost
        + config.mask_weight * mask_cost(predicted, wanted, counted)
        + config.dice_weight * _dice_cost(predicted, wanted, counted)
    )


def _cross_entropy_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    # -t log s(x) - (1 - t) log(1 - s(x)) = softplus(x) - t x, so all pairs cost one matrix product
    positive = F.softplus(logits)
    if counted is None:
        return (positive.sum(1, keepdim=True) - logits @ wanted.T) / logits.shape[1]
    total = counted.sum().clamp(min=1)
    return ((positive * counted).sum(1, keepdim=True) - (logits * counted) @ wanted.T) / total


def _focal_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    probability = logits.sigmoid()
    where_on = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
    where_off = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
    weight = torch.ones_like(logits[0]) if counted is None else counted
    total = (where_on * weight) @ wanted.T + (where_off * weight) @ (1 - wanted).T
    return total / weight.sum().clamp(min=1)


def _dice_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    probability = logits.sigmoid()
    if counted is not None:
        probability, wanted = probability * counted, wanted * counted
    overlap = 2 * probability @ wanted.T
    return 1 - (overlap + 1) / (probability.sum(1, keepdim=True) + wanted.sum(1) + 1)
