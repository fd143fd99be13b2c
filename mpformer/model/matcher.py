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
from mpformer.model.boxes import generalized_iou
from mpformer.model.objects import Objects
from mpformer.model.points import at_least_float32, cell_centers, inside, sample_masks, sample_shared
from mpformer.model.streams import Purpose, SampleRandom
from mpformer.model.transfer import to_device, to_host
from mpformer.types import Head, RunError

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
    head: Head, objects: Objects, config: LossConfig, draws: SampleRandom, image_ids: Sequence[str]
) -> list[Match]:
    """The assignment of each image's objects to distinct queries at least cost; min(Q, N) pairs.

    Cost: class (minus the probability of the object's class), mask (binary cross-entropy or focal loss) and
    dice, weighted as in the loss, on points that all queries and objects of an image share; by boxes: class,
    L1 distance and generalised IoU. A fixed assignment needs no costs: class k to query k. Raises
    `NonFiniteError` naming the image where a cost is not finite.
    """
    if config.assignment == "fixed":
        each = objects.labels.split(objects.counts)
        return [Match(labels, torch.arange(len(labels), device=labels.device)) for labels in each]
    points = matching_points(config, draws, len(objects.counts), 1, "matching")
    (costs,) = to_host_together(matching_costs([head], objects, config, points))
    matches = []
    for cost, count, image in zip(costs, objects.counts, image_ids):
        solved = assignment(cost[:, :count])
        if solved is None:
            raise NonFiniteError(f"matching: a cost of image {image} is not finite")
        both = to_device(torch.from_numpy(np.stack(solved)), head.mask_logits.device)
        matches.append(Match(*both.unbind()))
    return matches


def to_host_together(costs: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors of one dtype in one copy, for which the host waits."""
    if not costs:
        return []
    flat = to_host(torch.cat([cost.flatten() for cost in costs])).numpy()
    parts = np.split(flat, np.cumsum([cost.numel() for cost in costs])[:-1])
    return [part.reshape(cost.shape) for part, cost in zip(parts, costs)]


def assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows and columns of the assignment at least cost of [Q,N]; None if a cost is not finite."""
    if not np.isfinite(cost).all():
        return None
    return linear_sum_assignment(cost)


def matching_points(
    config: LossConfig, draws: SampleRandom, images: int, heads: int, purpose: Purpose
) -> Tensor | None:
    """[L,B,P,2] float32: the points of each head and image; None where the cost needs no random ones."""
    count = config.for_matching().points
    if config.assignment == "fixed" or config.match_by == "boxes" or count is None:
        return None
    head, image = np.divmod(np.arange(heads * images), images)
    return draws.rows(purpose, image, 0, head).points(count).unflatten(0, (heads, images))


def most_alike(similarity: Tensor) -> Tensor:
    """The one-to-one assignment with the largest sum: [Q,Q] -> [Q] int64, the column of each row."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(similarity.device)


def matching_costs(
    heads: Sequence[Head], objects: Objects, config: LossConfig, points: Tensor | None
) -> list[Tensor]:
    """[B,Q,N] float32 of each head, N being the most objects of an image: other images have fewer columns.

    points [L,B,P,2] as `matching_points` draws them; None: all cells of the predicted masks.
    """
    config = config.for_matching()
    padded = to_device(torch.from_numpy(objects.padded), objects.labels.device)
    labels = objects.labels[padded]
    class_costs = [-_probability_of(head.query_classes, labels) for head in heads]
    if config.match_by == "boxes":
        boxes = objects.boxes[padded][:, None]
        return [
            _box_cost(c, at_least_float32(h.query_boxes), boxes, config) for c, h in zip(class_costs, heads)
        ]
    maps, images = heads[0].mask_logits, to_device(torch.from_numpy(objects.images), objects.labels.device)
    limits = None
    if config.padding == "ignored":
        limits = to_device(torch.from_numpy(objects.limits), maps.device)[:, None]
    here, wanted = None, None
    costs = []
    # head by head: what all have at their points would be the largest memory of a step
    for number, (class_cost, head) in enumerate(zip(class_costs, heads)):
        logits = at_least_float32(head.mask_logits)
        if points is not None:
            here = points[number]
            predicted = sample_shared(logits, here)
            wanted = _truth_at(here, objects, images, padded, logits.dtype)
        else:  # at the cells' own centres, the same for all heads
            predicted = logits.flatten(2)
            if here is None or wanted is None:
                here = cell_centers(maps.shape[2:], maps.device).expand(maps.shape[0], -1, -1)
                wanted = _truth_at(here, objects, images, padded, logits.dtype)
        counted = None if limits is None else inside(here, limits).to(logits.dtype)
        costs.append(_mask_cost(class_cost, predicted, wanted, counted, config))
    return costs


def _probability_of(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Of [B,Q,K+1] the probabilities of labels [B,N]: [B,Q,N]."""
    probability = at_least_float32(class_logits).softmax(-1)
    return probability.gather(2, labels[:, None].expand(-1, probability.shape[1], -1))


def _truth_at(points: Tensor, objects: Objects, images: Tensor, padded: Tensor, dtype: torch.dtype) -> Tensor:
    """The masks of each image's objects at its points [B,P,2]: [B,N,P], N as `Objects.padded`."""
    rows = torch.arange(len(images), device=points.device)
    return sample_masks(objects.masks, rows, points[images].to(dtype))[padded]


def _box_cost(class_cost: Tensor, predicted: Tensor, wanted: Tensor, config: LossConfig) -> Tensor:
    """[B,Q,N]; predicted boxes [B,Q,4], wanted ones [B,1,N,4]."""
    predicted, wanted = predicted[:, :, None], wanted.to(predicted.dtype)
    return (
        config.class_weight * class_cost
        + config.box_weight * (predicted - wanted).abs().sum(3)
        - config.giou_weight * generalized_iou(predicted, wanted)
    )


def _mask_cost(
    class_cost: Tensor, predicted: Tensor, wanted: Tensor, counted: Tensor | None, config: LossConfig
) -> Tensor:
    """[B,Q,N]; logits [B,Q,P] and true masks [B,N,P] at the same points, which of them count [B,P]."""
    mask_cost = _focal_cost if config.mask_loss == "focal" else _cross_entropy_cost
    counted = None if counted is None else counted[:, None]
    return (
        config.class_weight * class_cost
        + config.mask_weight * mask_cost(predicted, wanted, counted)
        + config.dice_weight * _dice_cost(predicted, wanted, counted)
    )


def _cross_entropy_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    # -t log s(x) - (1 - t) log(1 - s(x)) = softplus(x) - t x, so all pairs cost one matrix product
    positive = F.softplus(logits)
    if counted is None:
        return (positive.sum(2, keepdim=True) - logits @ wanted.mT) / logits.shape[2]
    total = counted.sum(2, keepdim=True).clamp(min=1)
    return ((positive * counted).sum(2, keepdim=True) - (logits * counted) @ wanted.mT) / total


def _focal_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    probability = logits.sigmoid()
    where_on = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
    where_off = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
    if counted is None:
        return (where_on @ wanted.mT + where_off @ (1 - wanted).mT) / logits.shape[2]
    total = (where_on * counted) @ wanted.mT + (where_off * counted) @ (1 - wanted).mT
    return total / counted.sum(2, keepdim=True).clamp(min=1)


def _dice_cost(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    probability = logits.sigmoid()
    if counted is not None:
        probability, wanted = probability * counted, wanted * counted
    overlap = 2 * probability @ wanted.mT
    return 1 - (overlap + 1) / (probability.sum(2, keepdim=True) + wanted.sum(2)[:, None] + 1)
