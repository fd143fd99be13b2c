"""Losses of the matching part and of the pilots: class, mask and dice (Mask2Former section 3.3).

Every loss is a sum divided by a normaliser of the whole global batch, so gradients do not depend on how the
batch is dealt out to workers and micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config_model import Loss as LossConfig
from mpformer.config_model import Model as ModelConfig
from mpformer.model.matcher import Match
from mpformer.model.piloting import pilot_layout
from mpformer.model.points import at_least_float32, cell_centers, inside, sample, uncertain_points
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
    """Pilot slots that hold an object."""
    pilot_class_weight: float
    """Cross-entropy weights of all pilots."""
    queries: float
    """Queries of the matching part."""


def count_for_normalizers(targets: Sequence[Target], config: ModelConfig) -> list[float]:
    """A micro-batch's share of the `Normalizers`, known from its targets alone."""
    objects = [len(t.labels) for t in targets]
    queries, no_object = config.decoder.queries, config.loss.no_object_weight
    matched = [min(n, queries) for n in objects]
    class_weight = sum(m + no_object * (queries - m) for m in matched)
    layout = pilot_layout(objects, config.pilot)
    pilots = sum(layout.counts)
    pilot_class_weight = pilots + no_object * layout.fillers(config.pilot.rules())
    return [float(sum(objects)), class_weight, pilots, pilot_class_weight, float(queries * len(objects))]


def matching_losses(
    head: Head,
    targets: Sequence[Target],
    matches: Sequence[Match],
    normalizers: Normalizers,
    config: LossConfig,
    draws: SampleRandom,
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
    class_sum = _class_loss(head.class_logits, wanted_class, config)
    mask_sum, dice_sum = _mask_losses(head.mask_logits, targets, pairs, config, draws, valid_sizes)
    return {
        "class": config.class_weight * class_sum / normalizers.class_weight,
        "mask": config.mask_weight * mask_sum / normalizers.objects,
        "dice": config.dice_weight * dice_sum / normalizers.objects,
    }


def pilot_losses(
    head: Head,
    pilots: Pilots,
    objects: Tensor,
    targets: Sequence[Target],
    normalizers: Normalizers,
    config: LossConfig,
    draws: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Weighted losses of one head of the pilots (MP-Former section 4.2).

    objects [B,P] int64: the object that each slot has to reconstruct; its own (`pilots.objects`), unless
    pilots are matched.
    """
    no_object = head.class_logits.shape[2] - 1
    # slots of no group are padding that nothing is asked of
    wanted_class = torch.where(pilots.groups >= 0, no_object, _NOT_COUNTED)
    pairs = []
    for b, (target, count) in enumerate(zip(targets, pilots.counts)):
        wanted_class[b, :count] = target.labels[objects[b, :count]]
        pairs.append((torch.arange(count, device=objects.device), objects[b, :count]))
    class_sum = _class_loss(head.class_logits, wanted_class, config)
    mask_sum, dice_sum = _mask_losses(head.mask_logits, targets, pairs, config, draws, valid_sizes)
    return {
        "class": config.class_weight * class_sum / normalizers.pilot_class_weight,
        "mask": config.mask_weight * mask_sum / normalizers.pilots,
        "dice": config.dice_weight * dice_sum / normalizers.pilots,
    }


def consistency_losses(
    heads: Sequence[Head],
    normalizers: Normalizers,
    config: LossConfig,
    draws: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> list[Tensor]:
    """Weighted layer-consistency loss of each head but the first (MP-Former equation 6).

    The mask loss of every query's mask with its own mask at the head before as the label, averaged over
    queries; valid_sizes within images of `size`. The label is binary and carries no gradient.
    """
    losses = []
    for before, head in itertools.pairwise(heads):
        cross_entropy = dice = head.mask_logits.new_zeros(())
        for b, logits in enumerate(at_least_float32(head.mask_logits)):
            label = before.mask_logits[b].detach() >= 0
            if config.points is None:
                points = cell_centers(*logits.shape[1:], logits.device).expand(len(logits), -1, -1)
            else:
                points = _loss_points(logits, config, draws, b)
            predicted, wanted = sample(logits, points), sample(label.to(logits.dtype), points)
            counted = _counted(points, config, valid_sizes[b], size)
            cross_entropy = cross_entropy + _cross_entropy(predicted, wanted, counted).sum()
            dice = dice + _dice(predicted, wanted, counted).sum()
        loss = config.mask_weight * cross_entropy + config.dice_weight * dice
        losses.append(config.consistency_weight * loss / normalizers.queries)
    return losses


_NOT_COUNTED = -100
"""The label that cross-entropy leaves out."""


def _class_loss(logits: Tensor, wanted: Tensor, config: LossConfig) -> Tensor:
    """Weighted sum of the cross-entropies; logits [B,Q,K+1], wanted [B,Q] in 0..K."""
    logits = at_least_float32(logits)
    weights = torch.ones(logits.shape[2], dtype=logits.dtype, device=logits.device)
    weights[-1] = config.no_object_weight
    return F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum", ignore_index=_NOT_COUNTED
    )


def _mask_losses(
    mask_logits: Tensor,
    targets: Sequence[Target],
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: LossConfig,
    draws: SampleRandom,
    valid_sizes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Sums over all pairs of the mean cross-entropy and of the dice loss; mask_logits [B,Q,H/4,W/4]."""
    cross_entropy = mask_logits.new_zeros(())
    dice = mask_logits.new_zeros(())
    for b, (target, (queries, objects)) in enumerate(zip(targets, pairs)):
        logits = at_least_float32(mask_logits[b, queries])
        masks = target.masks
        if config.points is None:
            # full masks: predictions raised to the ground truth's size
            size = masks.shape[1:]
            predicted = _resize(logits, size).flatten(1)
            wanted = masks[objects].flatten(1).to(logits.dtype)
            points = cell_centers(*size, logits.device)
        else:
            points = _loss_points(logits, config, draws, b)
            predicted = sample(logits, points)
            wanted = _sample_objects(masks, objects, points, logits.dtype)
        counted = _counted(points, config, valid_sizes[b], masks.shape[1:])
        cross_entropy = cross_entropy + _cross_entropy(predicted, wanted, counted).sum()
        dice = dice + _dice(predicted, wanted, counted).sum()
    return cross_entropy, dice


def _counted(
    points: Tensor, config: LossConfig, valid_size: tuple[int, int], size: tuple[int, int]
) -> Tensor | None:
    """Which points count, as 0 or 1; None if all do."""
    return inside(points, valid_size, size).float() if config.padding == "ignored" else None


def _loss_points(logits: Tensor, config: LossConfig, draws: SampleRandom, b: int) -> Tensor:
    """[n,P,2] points of each mask's own."""
    count = len(logits)
    important = int(config.importance * config.points)
    candidates = draws.uniform(b, count, int(config.oversample * config.points), 2)
    uniform = draws.uniform(b, count, config.points - important, 2)
    return uncertain_points(logits, candidates, uniform, important)


@torch.no_grad()
def _sample_objects(masks: Tensor, objects: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of masks[objects[i]] at points[i]: masks [N,H,W] bool, objects [n], points [n,P,2] -> [n,P]."""
    if len(objects) > len(masks):
        # each group of pilots holds each object once: a mask is read once, at the points of all groups
        order = objects.argsort(stable=True)
        values = sample(masks.to(dtype), points[order].view(len(masks), -1, 2))
        return values.view(points.shape[:2])[order.argsort()]
    return sample(masks[objects].to(dtype), points)


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
