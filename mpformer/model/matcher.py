"""Bipartite matching of predictions to ground truth (Mask2Former section 3.3; DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.model.boxes import generalized_iou, relative_boxes
from mpformer.model.points import at_least_float32, cell_centers, inside, matching_points, sample_shared
from mpformer.model.streams import SampleRandom
from mpformer.model.transfer import to_device, to_host
from mpformer.types import Head, RunError, Target

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
"""Parameters of the focal loss (Lin et al. 2017) in DETR and MaskFormer."""


class NonFiniteError(RunError):
    """A loss, cost or gradient is not finite: the run stops before the optimiser step."""


@dataclass(frozen=True)
class Match:
    """The pairs of one image: query `queries[i]` predicts object `objects[i]`; both [n] int64."""

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
    """The assignment of each image's objects to distinct queries at least cost; min(Q, N) pairs.

    Cost: class (minus the probability of the object's class), mask (binary cross-entropy or focal loss) and
    dice, weighted as in the loss, on points that all queries and objects of an image share; by boxes: class,
    L1 distance and generalised IoU. A fixed assignment needs no costs: class k to query k. Raises
    `NonFiniteError` naming the image where a cost is not finite.
    """
    if config.assignment == "fixed":
        return fixed_matches(targets)
    points = [matching_points(config, draws, b) for b in range(len(targets))]
    matches, failed = assign(matching_costs(head, targets, config, points, valid_sizes))
    if failed:
        raise NonFiniteError(f"matching: a cost of image {image_ids[failed[0]]} is not finite")
    return matches


def fixed_matches(targets: Sequence[Target]) -> list[Match]:
    """Class k to query k."""
    return [Match(t.labels, torch.arange(len(t.labels), device=t.labels.device)) for t in targets]


def assign(costs: Sequence[Tensor]) -> tuple[list[Match], list[int]]:
    """The assignment at least cost of each [...,Q,N] float32 of `costs`, and the indices of those that are
    not finite, whose pairs are meaningless.

    Leading dimensions are solved one by one, each with indices of its own. All costs go to the host in one
    copy, and the pairs back in one. A thread for each would be slower: for 160 of 100 queries and 20 objects
    12 ms instead of 3, on two cores.
    """
    if not costs:
        return [], []
    table = to_host(torch.cat([cost.flatten() for cost in costs])).numpy()
    failed, counts, pairs = [], [], [np.empty((2, 0), np.int64)]
    end = 0
    for number, cost in enumerate(costs):
        start, end = end, end + cost.numel()
        values = table[start:end].reshape(-1, *cost.shape[-2:]) if cost.numel() else np.empty((0, 0, 0))
        if not np.isfinite(values).all():
            failed.append(number)
            values = np.zeros_like(values)
        solved = [linear_sum_assignment(matrix) for matrix in values]
        counts.append(sum(len(queries) for queries, _ in solved))
        pairs += [np.stack(both) for both in solved]
    found = to_device(torch.from_numpy(np.concatenate(pairs, axis=1)), costs[0].device)
    return [Match(*both.unbind()) for both in found.split(counts, dim=1)], failed


def most_alike(similarity: Tensor) -> Tensor:
    """The one-to-one assignment with the largest sum: [Q,Q] -> [Q] int64, the column of each row."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(similarity.device)


def matching_costs(
    head: Head,
    targets: Sequence[Target],
    config: LossConfig,
    points: Sequence[Tensor | None],
    valid_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """[Q,N] float32 of each image; points as `matching_points` draws them."""
    config = config.for_matching()
    probability = at_least_float32(head.query_classes).softmax(-1)
    class_costs = [-of_image[:, t.labels] for of_image, t in zip(probability, targets)]
    if config.match_by == "boxes":
        boxes = at_least_float32(head.query_boxes)
        return [_box_cost(c, b, t, config) for c, b, t in zip(class_costs, boxes, targets)]
    logits = at_least_float32(head.mask_logits)
    drawn = [p for p in points if p is not None]
    if drawn:
        predicted = sample_shared(logits, torch.stack(drawn))
    else:
        drawn = [cell_centers(logits.shape[2:], logits.device)] * len(targets)
        predicted = logits.flatten(2)  # at their own centres
    each = zip(class_costs, predicted, targets, drawn, valid_sizes)
    return [_mask_cost(c, p, t, config, at, valid) for c, p, t, at, valid in each]


def _box_cost(class_cost: Tensor, predicted: Tensor, target: Target, config: LossConfig) -> Tensor:
    """[Q,N]; predicted boxes [Q,4]."""
    predicted = predicted[:, None]
    wanted = relative_boxes(target.masks).to(predicted.dtype)[None]
    return (
        config.class_weight * class_cost
        + config.box_weight * (predicted - wanted).abs().sum(2)
        - config.giou_weight * generalized_iou(predicted, wanted)
    )


def _mask_cost(
    class_cost: Tensor,
    predicted: Tensor,
    target: Target,
    config: LossConfig,
    points: Tensor,
    valid_size: tuple[int, int],
) -> Tensor:
    """[Q,N] of one image; predicted [Q,P] logits at points [P,2]."""
    wanted = sample_shared(target.masks.to(predicted.dtype)[None], points[None])[0]
    counted = None
    if config.padding == "ignored":
        counted = inside(points, valid_size, target.masks.shape[1:]).to(predicted.dtype)
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
