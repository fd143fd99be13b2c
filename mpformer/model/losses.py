"""Losses of the matching part and of the pilots: class, mask and dice (Mask2Former section 3.3).

Every loss is a sum divided by a normaliser of the whole global batch, so gradients do not depend on how the
batch is dealt out to workers and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config import Loss as LossConfig
from mpformer.model.matcher import Match
from mpformer.model.piloting import pilot_slots
from mpformer.model.points import cell_centers, inside, sample, uncertain_points
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Pilots, Target


@dataclass(frozen=True)
class Normalizers:
    """What the losses are divided by, summed over the global batch; each at least 1."""

    objects: float
    """Ground-truth objects."""
    class_weight: float
    """Cross-entropy weights of all queries: 1 per matched query, `no_object_weight` per other one."""
    pilots: float
    """Pilot slots in use."""


def count_for_normalizers(
    targets: Sequence[Target], queries: int, pilot_queries: int, config: LossConfig
) -> list[float]:
    """This worker's share of the three `Normalizers`, known from the targets alone."""
    objects = [len(t.labels) for t in targets]
    matched = [min(n, queries) for n in objects]
    weight = sum(m + config.no_object_weight * (queries - m) for m in matched)
    return [float(sum(objects)), weight, float(sum(pilot_slots(n, pilot_queries) for n in objects))]


def matching_losses(
    head: Head,
    targets: Sequence[Target],
    matches: Sequence[Match],
    normalizers: Normalizers,
    config: LossConfig,
    streams: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Weighted losses {'class', 'mask', 'dice'} of one head of the matching part."""
    device = head.mask_logits.device
    batch, queries, outputs = head.class_logits.shape
    wanted_class = torch.full((batch, queries), outputs - 1, dtype=torch.long, device=device)
    pairs = []
    for b, (target, m) in enumerate(zip(targets, matches)):
        chosen, objects = m.queries.to(device), m.objects.to(device)
        wanted_class[b, chosen] = target.labels[objects]
        pairs.append((chosen, objects))
    weights = torch.ones(outputs, device=device)
    weights[-1] = config.no_object_weight
    class_sum = F.cross_entropy(
        head.class_logits.float().flatten(0, 1), wanted_class.flatten(), weights, reduction="sum"
    )
    mask_sum, dice_sum = _mask_losses(head.mask_logits, targets, pairs, config, streams, valid_sizes)
    return {
        "class": config.class_weight * class_sum / normalizers.class_weight,
        "mask": config.mask_weight * mask_sum / normalizers.objects,
        "dice": config.dice_weight * dice_sum / normalizers.objects,
    }


def pilot_losses(
    head: Head,
    pilots: Pilots,
    targets: Sequence[Target],
    normalizers: Normalizers,
    config: LossConfig,
    streams: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Weighted losses of one head of the pilots, each tied to its object without matching (section 4.2)."""
    logits, wanted, pairs = [], [], []
    for b, (target, count) in enumerate(zip(targets, pilots.counts)):
        objects = pilots.objects[b, :count]
        logits.append(head.class_logits[b, :count])
        wanted.append(target.labels[objects])
        pairs.append((torch.arange(count, device=objects.device), objects))
    class_sum = F.cross_entropy(torch.cat(logits).float(), torch.cat(wanted), reduction="sum")
    mask_sum, dice_sum = _mask_losses(head.mask_logits, targets, pairs, config, streams, valid_sizes)
    return {
        "class": config.class_weight * class_sum / normalizers.pilots,
        "mask": config.mask_weight * mask_sum / normalizers.pilots,
        "dice": config.dice_weight * dice_sum / normalizers.pilots,
    }


def _mask_losses(
    mask_logits: Tensor,
    targets: Sequence[Target],
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: LossConfig,
    streams: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Sums over all pairs of the mean cross-entropy and of the dice loss; mask_logits [B,Q,H/4,W/4]."""
    cross_entropy = mask_logits.new_zeros((), dtype=torch.float32)
    dice = mask_logits.new_zeros((), dtype=torch.float32)
    for b, (target, (queries, objects)) in enumerate(zip(targets, pairs)):
        logits = mask_logits[b, queries].float()
        masks = target.masks
        if config.points is None:
            # full masks: predictions raised to the ground truth's size
            size = masks.shape[1:]
            predicted = _resize(logits, size).flatten(1)
            wanted = masks[objects].flatten(1).float()
            points = cell_centers(*size, logits.device)
        else:
            points = _loss_points(logits, config, streams, b)
            predicted = sample(logits, points)
            wanted = _sample_objects(masks, objects, points)
        counted = None
        if config.padding == "ignored":
            counted = inside(points, valid_sizes[b], masks.shape[1:]).float()
        cross_entropy = cross_entropy + _cross_entropy(predicted, wanted, counted).sum()
        dice = dice + _dice(predicted, wanted, counted).sum()
    return cross_entropy, dice


def _loss_points(logits: Tensor, config: LossConfig, streams: SampleRandom, b: int) -> Tensor:
    """[n,P,2] points of each mask's own."""
    count = len(logits)
    important = int(config.importance * config.points)
    candidates = streams.uniform(b, count, int(config.oversample * config.points), 2)
    uniform = streams.uniform(b, count, config.points - important, 2)
    return uncertain_points(logits, candidates, uniform, important)


@torch.no_grad()
def _sample_objects(masks: Tensor, objects: Tensor, points: Tensor) -> Tensor:
    """Values of masks[objects[i]] at points[i]: masks [N,H,W] bool, objects [n], points [n,P,2] -> [n,P]."""
    count, per_group = len(objects), len(masks)
    if count > per_group and count % per_group == 0:
        # groups of pilots repeat all objects in order: each mask is read once, at the points of all groups
        grouped = points.unflatten(0, (-1, per_group)).transpose(0, 1).flatten(1, 2)
        values = sample(masks.float(), grouped)
        return values.unflatten(1, (-1, points.shape[1])).transpose(0, 1).flatten(0, 1)
    return sample(masks[objects].float(), points)


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if len(logits) == 0:
        return logits.new_zeros(0, *size) + logits.sum()
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _cross_entropy(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """Mean binary cross-entropy of each mask over its (counted) points, [n]."""
    values = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if counted is None:
        return values.mean(1)
    return (values * counted).sum(1) / counted.sum(-1).clamp(min=1)


def _dice(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """Dice loss of each mask, smoothed by 1, [n]."""
    probability = logits.sigmoid()
    if counted is not None:
        probability, wanted = probability * counted, wanted * counted
    overlap = 2 * (probability * wanted).sum(1)
    return 1 - (overlap + 1) / (probability.sum(1) + wanted.sum(1) + 1)
