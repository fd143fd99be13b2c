"""Losses of the matching part and of the pilots: class, mask and dice (Mask2Former section 3.3).

Every loss is a sum divided by a normaliser of the whole global batch, so gradients do not depend on how the
batch is divided among workers and micro-batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.config.model import Model as ModelConfig
from mpformer.config.model import PointCounts
from mpformer.model.architecture import Structure
from mpformer.model.boxes import generalized_iou, relative_boxes
from mpformer.model.matcher import FOCAL_ALPHA, FOCAL_GAMMA, Match
from mpformer.model.piloting import pilot_layout
from mpformer.model.points import (
    at_least_float32,
    cell_centers,
    inside,
    least_certain,
    loss_points,
    sample,
    uncertain_points,
    unpack,
)
from mpformer.model.streams import SampleRandom
from mpformer.model.transfer import to_device
from mpformer.ops.mask_points import MaskPairs, kernel_for_mask_points, mask_point_losses
from mpformer.types import Batch, Head, Pilots, Target


@dataclass(frozen=True)
class Normalizers:
    """Denominators of the losses, summed over the global batch; each at least 1.

    Scalars on the device of the losses, so that the host need not wait for them, or numbers.
    """

    objects: Tensor | float
    """Ground-truth objects."""
    class_weight: Tensor | float
    """Cross-entropy weights of all queries: 1 per matched query, `no_object_weight` per other one."""
    pilots: Tensor | float
    """Pilot slots that hold an object."""
    pilot_class_weight: Tensor | float
    """Cross-entropy weights of all pilots."""
    queries: Tensor | float
    """Queries of the matching part; of a per-pixel model its class maps."""
    pixels: Tensor | float = 1.0
    """Labelled pixels; counted for per-pixel models only."""


def count_for_normalizers(targets: Sequence[Target], config: ModelConfig, structure: Structure) -> Tensor:
    """A micro-batch's share of the `Normalizers`, known from its targets and the model's structure.

    [6] float64, in the order of their fields, on the targets' device.
    """
    objects = [len(t.labels) for t in targets]
    queries, no_object = structure.queries, config.loss.no_object_weight
    matched = [min(n, queries) for n in objects]
    class_weight = sum(m + no_object * (queries - m) for m in matched)
    layout = pilot_layout(objects, config.pilot)
    pilots = sum(layout.counts)
    pilot_class_weight = pilots + no_object * layout.fillers(config.pilot.rules())
    counts = [sum(objects), class_weight, pilots, pilot_class_weight, queries * len(objects), 0]
    result = to_device(torch.tensor(counts, dtype=torch.float64), targets[0].labels.device)
    if structure.per_pixel:
        result[-1:] = torch.stack([t.masks.any(0).sum() for t in targets]).sum()
    return result


def matching_losses(
    head: Head,
    batch: Batch,
    matches: Sequence[Match],
    normalizers: Normalizers,
    config: LossConfig,
    points: Points,
) -> dict[str, Tensor]:
    """Weighted losses {'class', 'mask', 'dice'} of one head of the matching part; boxes: 'box', 'giou'."""
    class_logits = head.query_classes
    images, queries, outputs = class_logits.shape
    wanted_class = torch.full((images, queries), outputs - 1, dtype=torch.long, device=class_logits.device)
    pairs = []
    for b, (target, m) in enumerate(zip(batch.targets, matches)):
        wanted_class[b, m.queries] = target.labels[m.objects]
        pairs.append((m.queries, m.objects))
    class_sum = _class_loss(class_logits, wanted_class, config)
    mask_sum, dice_sum = _mask_losses(head.mask_logits, batch, pairs, config, points)
    return {
        "class": config.class_weight * class_sum / normalizers.class_weight,
        "mask": config.mask_weight * mask_sum / normalizers.objects,
        "dice": config.dice_weight * dice_sum / normalizers.objects,
        **_box_losses(head, batch.targets, pairs, config, normalizers.objects),
    }


def pilot_losses(
    head: Head,
    pilots: Pilots,
    objects: Tensor,
    batch: Batch,
    normalizers: Normalizers,
    config: LossConfig,
    points: Points,
) -> dict[str, Tensor]:
    """Weighted losses of one head of the pilots (MP-Former section 4.2).

    objects [B,P] int64: the object that each slot has to reconstruct; its own (`pilots.objects`), unless
    pilots are matched. points: with `loss.shared_pilot_points` those of each object of a group.
    """
    class_logits = head.query_classes
    no_object = class_logits.shape[2] - 1
    # slots of no group are padding without a loss
    wanted_class = torch.where(pilots.groups >= 0, no_object, _NOT_COUNTED)
    pairs = []
    for b, (target, count) in enumerate(zip(batch.targets, pilots.counts)):
        wanted_class[b, :count] = target.labels[objects[b, :count]]
        pairs.append((torch.arange(count, device=objects.device), objects[b, :count]))
    class_sum = _class_loss(class_logits, wanted_class, config)
    shared = config.shared_pilot_points
    mask_sum, dice_sum = _mask_losses(head.mask_logits, batch, pairs, config, points, shared)
    return {
        "class": config.class_weight * class_sum / normalizers.pilot_class_weight,
        "mask": config.mask_weight * mask_sum / normalizers.pilots,
        "dice": config.dice_weight * dice_sum / normalizers.pilots,
        **_box_losses(head, batch.targets, pairs, config, normalizers.pilots),
    }


def per_pixel_losses(
    head: Head, targets: Sequence[Target], normalizers: Normalizers, config: LossConfig
) -> dict[str, Tensor]:
    """Weighted losses of one head of a per-pixel model, on all labelled pixels at the targets' size.

    {'pixel'}: mean cross-entropy over the pixels of the global batch; or {'mask', 'dice'}: mean over its
    class maps, which are empty for classes that an image lacks. Pixels of no object are not counted.
    """
    pixel = mask = dice = head.mask_logits.new_zeros(())
    classes = head.mask_logits.shape[1]
    for logits, target in zip(at_least_float32(head.mask_logits), targets):
        raised = _resize(logits, target.masks.shape[1:])
        if config.per_pixel == "cross_entropy":
            wanted = torch.full(raised.shape[1:], _NOT_COUNTED, device=raised.device)
            for label, region in zip(target.labels, target.masks):
                wanted = torch.where(region, label, wanted)
            pixel = pixel + F.cross_entropy(
                raised[None], wanted[None], reduction="sum", ignore_index=_NOT_COUNTED
            )
        else:
            maps = raised.new_zeros(classes, raised[0].numel())
            maps.index_add_(0, target.labels, target.masks.flatten(1).to(maps.dtype)).clamp_(max=1)
            pairs = raised.flatten(1), maps, maps.amax(0)
            mask = mask + _mask_loss(*pairs, config).sum()
            dice = dice + _dice(*pairs).sum()
    if config.per_pixel == "cross_entropy":
        return {"pixel": pixel / normalizers.pixels}
    return {
        "mask": config.mask_weight * mask / normalizers.queries,
        "dice": config.dice_weight * dice / normalizers.queries,
    }


def consistency_losses(
    heads: Sequence[Head], batch: Batch, normalizers: Normalizers, config: LossConfig, draws: SampleRandom
) -> list[Tensor]:
    """Weighted layer-consistency loss of each head but the first (MP-Former equation 6).

    The mask loss of every query's mask with its own mask at the head before as the label, averaged over
    queries. The label is binary and carries no gradient.
    """
    losses = []
    size, counts = batch.images.shape[2:], config.point_counts()
    for before, head in itertools.pairwise(heads):
        cross_entropy = dice = head.mask_logits.new_zeros(())
        for b, logits in enumerate(at_least_float32(head.mask_logits)):
            label = before.mask_logits[b].detach() >= 0
            if counts is None:
                points = cell_centers(logits.shape[1:], logits.device).expand(len(logits), -1, -1)
            else:
                points = _kept_points(logits, loss_points(len(logits), counts, draws, b), counts)
            predicted, wanted = sample(logits, points), sample(label.to(logits.dtype), points)
            counted = _counted(points, config, batch.valid_sizes[b], size)
            cross_entropy = cross_entropy + _mask_loss(predicted, wanted, counted, config).sum()
            dice = dice + _dice(predicted, wanted, counted).sum()
        loss = config.mask_weight * cross_entropy + config.dice_weight * dice
        losses.append(config.consistency_weight * loss / normalizers.queries)
    return losses


_NOT_COUNTED = -100
"""The label that cross-entropy ignores."""

Points = Sequence[tuple[Tensor, Tensor]]
"""Of each image, as `points.loss_points` draws them; empty for losses on full masks."""


def _class_loss(logits: Tensor, wanted: Tensor, config: LossConfig) -> Tensor:
    """Weighted sum of the cross-entropies; logits [B,Q,K+1], wanted [B,Q] in 0..K."""
    logits = at_least_float32(logits)
    weights = F.pad(logits.new_ones(logits.shape[2] - 1), (0, 1), value=config.no_object_weight)
    return F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum", ignore_index=_NOT_COUNTED
    )


def _mask_losses(
    mask_logits: Tensor,
    batch: Batch,
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: LossConfig,
    points: Points,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums over all pairs of the mean mask loss and of the dice loss; mask_logits [B,Q,H/4,W/4].

    shared: the pairs of one object of an image share their points.
    """
    counts = config.point_counts()
    if counts is not None and config.mask_loss == "cross_entropy":
        library = kernel_for_mask_points(mask_logits)
        if library is not None:
            images = _kernel_inputs(mask_logits, batch, pairs, config, points, counts, shared)
            important = 0 if shared else counts.important
            both = mask_point_losses(library, mask_logits, images, important)
            return both[0].sum(), both[1].sum()
    cross_entropy = mask_logits.new_zeros(())
    dice = mask_logits.new_zeros(())
    selected = _selected(mask_logits, [queries for queries, _ in pairs])
    for b, (target, (_, objects)) in enumerate(zip(batch.targets, pairs)):
        logits = at_least_float32(selected[b])
        masks = target.masks
        if counts is None:
            # full masks: predictions raised to the ground truth's size
            size = masks.shape[1:]
            predicted = _resize(logits, size).flatten(1)
            wanted = masks[objects].flatten(1).to(logits.dtype)
            kept = cell_centers(size, logits.device)
        else:
            if shared:
                packed, rows = _shared_points(logits, objects, points[b], counts)
                kept = unpack(packed[rows])
            else:
                kept = _kept_points(logits, points[b], counts)
            predicted = sample(logits, kept)
            wanted = _sample_objects(masks, objects, kept, logits.dtype)
        counted = _counted(kept, config, batch.valid_sizes[b], masks.shape[1:])
        cross_entropy = cross_entropy + _mask_loss(predicted, wanted, counted, config).sum()
        dice = dice + _dice(predicted, wanted, counted).sum()
    return cross_entropy, dice


def _selected(mask_logits: Tensor, queries: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of each image the maps of its queries [n]: [B,Q,h,w] -> B tensors [n,h,w].

    One selection for the batch: its gradient fills the maps of all images once, not once for each image.
    """
    images = torch.cat([torch.full_like(chosen, b) for b, chosen in enumerate(queries)])
    # not rows of a flattened view: the pilots' maps are a part of a larger tensor, which would be copied
    return mask_logits[images, torch.cat(list(queries))].split([len(chosen) for chosen in queries])


def _kernel_inputs(
    mask_logits: Tensor,
    batch: Batch,
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: LossConfig,
    points: Points,
    counts: PointCounts,
    shared: bool,
) -> list[MaskPairs]:
    """The pairs of each image as the fused kernel takes them; shared points are chosen here."""
    images = []
    for b, (target, (queries, objects)) in enumerate(zip(batch.targets, pairs)):
        candidates, uniform = points[b]
        rows = None
        if shared:
            kept, rows = _shared_points(mask_logits[b, queries], objects, points[b], counts)
            order = rows.argsort()
            queries, objects, rows = queries[order], objects[order], rows[order]
            candidates, uniform = kept[:, :0], kept
        limit = (math.inf, math.inf)
        if config.padding == "ignored":
            (height, width), size = batch.valid_sizes[b], target.masks.shape[1:]
            limit = (width / size[1], height / size[0])
        images.append(MaskPairs(queries, objects, target.masks, candidates, uniform, limit, rows))
    return images


def _box_losses(
    head: Head,
    targets: Sequence[Target],
    pairs: Sequence[tuple[Tensor, Tensor]],
    config: LossConfig,
    count: Tensor | float,
) -> dict[str, Tensor]:
    """L1 and generalised IoU of the paired boxes, weighted, sums over `count` (DETR); none without boxes."""
    boxes = head.boxes
    if boxes is None:
        return {}
    predicted = torch.cat([boxes[b, queries] for b, (queries, _) in enumerate(pairs)])
    predicted = at_least_float32(predicted)
    wanted = torch.cat([relative_boxes(t.masks)[objects] for t, (_, objects) in zip(targets, pairs)])
    wanted = wanted.to(predicted.dtype)
    distance, giou = (predicted - wanted).abs().sum(), (1 - generalized_iou(predicted, wanted)).sum()
    return {"box": config.box_weight * distance / count, "giou": config.giou_weight * giou / count}


def _counted(
    points: Tensor, config: LossConfig, valid_size: Sequence[int], size: Sequence[int]
) -> Tensor | None:
    """Which points count, as 0 or 1; None if all do."""
    return inside(points, valid_size, size).float() if config.padding == "ignored" else None


def _kept_points(logits: Tensor, drawn: tuple[Tensor, Tensor], counts: PointCounts) -> Tensor:
    """[n,P,2] points of each mask's own."""
    candidates, uniform = drawn
    return uncertain_points(logits, unpack(candidates), unpack(uniform), counts.important)


def _shared_points(
    logits: Tensor, objects: Tensor, drawn: tuple[Tensor, Tensor], counts: PointCounts
) -> tuple[Tensor, Tensor]:
    """[m,P] int32: packed points of each distinct object; [n] int64: the row of each of `objects`.

    objects [n]: group by group, each group holds every object once. Of an object's candidates those are kept
    at which the mean of its predictions is least certain.
    """
    candidates, uniform = drawn
    own, _ = objects[: len(candidates)].sort()
    place = torch.searchsorted(own, objects)
    sums = at_least_float32(logits.detach()).new_zeros(len(own), *logits.shape[1:])
    # every group holds every object once, so a sum of logits is as uncertain as their mean
    sums.index_add_(0, place, logits.detach().to(sums.dtype))
    kept = least_certain(sums, candidates, counts.important)
    return torch.cat((kept, uniform), dim=1), place


@torch.no_grad()
def _sample_objects(masks: Tensor, objects: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of masks[objects[i]] at points[i]: masks [N,H,W] bool, objects [n], points [n,P,2] -> [n,P]."""
    if len(objects) > len(masks):
        # each group of pilots holds each object once: each mask is sampled once, at the points of all groups
        order = objects.argsort(stable=True)
        values = sample(masks.to(dtype), points[order].view(len(masks), -1, 2))
        return values.view(points.shape[:2])[order.argsort()]
    return sample(masks[objects].to(dtype), points)


def _resize(logits: Tensor, size: Sequence[int]) -> Tensor:
    if len(logits) == 0:
        return logits.new_zeros(0, *size) + logits.sum()
    return F.interpolate(logits[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _mask_loss(logits: Tensor, wanted: Tensor, counted: Tensor | None, config: LossConfig) -> Tensor:
    """Mean binary cross-entropy, or focal loss, of each mask over its (counted) points, [n]."""
    values = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if config.mask_loss == "focal":
        # exp(-cross-entropy) is the probability of what is wanted
        balance = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
        values = balance * (1 - (-values).exp()) ** FOCAL_GAMMA * values
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
