"""Losses of the matching part and of the pilots: class, mask and dice (Mask2Former section 3.3).

Every loss is a sum divided by a normaliser of the whole global batch, so gradients do not depend on how the
batch is divided among workers and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.config.model import Model as ModelConfig
from mpformer.model.architecture import Structure
from mpformer.model.boxes import generalized_iou
from mpformer.model.mask_losses import mask_losses
from mpformer.model.objects import Objects
from mpformer.model.pairs import Pairs, tabulate
from mpformer.model.per_pixel import labelled_pixels
from mpformer.model.piloting import pilot_layout
from mpformer.model.points import at_least_float32
from mpformer.model.streams import SampleRandom
from mpformer.model.transfer import to_device
from mpformer.types import Batch, Head, Pilots


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


def count_for_normalizers(batch: Batch, config: ModelConfig, structure: Structure) -> Tensor:
    """A micro-batch's share of the `Normalizers`, known from its targets and the model's structure.

    [6] float64, in the order of their fields, on the targets' device.
    """
    objects = [len(target.labels) for target in batch.targets]
    queries, no_object = structure.queries, config.loss.no_object_weight
    matched = [min(n, queries) for n in objects]
    class_weight = sum(m + no_object * (queries - m) for m in matched)
    layout = pilot_layout(objects, config.pilot)
    pilots = sum(layout.counts)
    pilot_class_weight = pilots + no_object * layout.fillers(config.pilot.rules())
    counts = [sum(objects), class_weight, pilots, pilot_class_weight, queries * len(objects), 0]
    result = to_device(torch.tensor(counts, dtype=torch.float64), batch.images.device)
    if structure.per_pixel:
        result[-1] = labelled_pixels(batch.targets)
    return result


def matching_losses(
    heads: Sequence[Head], objects: Objects, pairs: Pairs, normalizers: Normalizers, config: LossConfig
) -> dict[str, Tensor]:
    """Weighted losses of each head of the matching part: {'class', 'mask', 'dice'}, with boxes 'box' and
    'giou', each [L]."""
    class_logits = torch.stack([head.query_classes for head in heads])
    wanted_class = torch.full(
        class_logits.shape[:3], class_logits.shape[3] - 1, dtype=torch.long, device=class_logits.device
    )
    class_sums = _class_losses(class_logits, _with_labels(wanted_class, objects, pairs), config)
    mask_sums, dice_sums = _mask_sums(heads, objects, pairs, config)
    return {
        "class": config.class_weight * class_sums / normalizers.class_weight,
        "mask": config.mask_weight * mask_sums / normalizers.objects,
        "dice": config.dice_weight * dice_sums / normalizers.objects,
        **_box_losses(heads, objects, pairs, config, normalizers.objects),
    }


def pilot_losses(
    heads: Sequence[Head],
    pilots: Pilots,
    objects: Objects,
    pairs: Pairs,
    normalizers: Normalizers,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Weighted losses of each head of the pilots (MP-Former section 4.2), as `matching_losses`.

    pairs: the object that each slot has to reconstruct; with `loss.shared_pilot_points` those of an object
    share their points.
    """
    class_logits = torch.stack([head.query_classes for head in heads])
    # slots of no group are padding without a loss
    unused = torch.where(pilots.groups >= 0, class_logits.shape[3] - 1, _NOT_COUNTED)
    wanted_class = unused.expand(len(heads), -1, -1).clone()
    class_sums = _class_losses(class_logits, _with_labels(wanted_class, objects, pairs), config)
    mask_sums, dice_sums = _mask_sums(heads, objects, pairs, config, config.shared_pilot_points)
    return {
        "class": config.class_weight * class_sums / normalizers.pilot_class_weight,
        "mask": config.mask_weight * mask_sums / normalizers.pilots,
        "dice": config.dice_weight * dice_sums / normalizers.pilots,
        **_box_losses(heads, objects, pairs, config, normalizers.pilots),
    }


def consistency_losses(
    heads: Sequence[Head], objects: Objects, normalizers: Normalizers, config: LossConfig, draws: SampleRandom
) -> Tensor:
    """Weighted layer-consistency loss of each head but the first (MP-Former equation 6): [L-1].

    The mask loss of every query's mask with its own mask at the head before as the label, averaged over
    queries. The label is binary and carries no gradient.
    """
    maps = [head.mask_logits for head in heads]
    images, queries = maps[0].shape[:2]
    labels = torch.cat([(of_head.detach() >= 0).flatten(0, 1) for of_head in maps[:-1]])
    number = np.arange(len(labels))
    head, image, query = np.unravel_index(number, (len(maps) - 1, images, queries))
    drawn = draws.rows("consistency", image, query, head)
    pairs = tabulate(np.stack((head, image, query, number, number)), len(maps) - 1, drawn, draws.device)
    mask_sums, dice_sums = mask_losses(maps[1:], labels, pairs, objects.limits, config)
    total = config.mask_weight * mask_sums + config.dice_weight * dice_sums
    return config.consistency_weight * total / normalizers.queries


_NOT_COUNTED = -100
"""The label that cross-entropy ignores."""


def _with_labels(wanted: Tensor, objects: Objects, pairs: Pairs) -> Tensor:
    """Class targets [L,B,Q] int64, in which the paired queries get their objects' labels."""
    wanted[pairs.heads, pairs.images, pairs.queries] = objects.labels[pairs.objects]
    return wanted


def _class_losses(logits: Tensor, wanted: Tensor, config: LossConfig) -> Tensor:
    """Weighted sum of the cross-entropies of each head: logits [L,B,Q,K+1], wanted [L,B,Q] in 0..K -> [L]."""
    logits = at_least_float32(logits)
    weights = F.pad(logits.new_ones(logits.shape[3] - 1), (0, 1), value=config.no_object_weight)
    each = F.cross_entropy(
        logits.flatten(0, 2), wanted.flatten(), weights, reduction="none", ignore_index=_NOT_COUNTED
    )
    return each.view(len(logits), -1).sum(1)


def _mask_sums(
    heads: Sequence[Head], objects: Objects, pairs: Pairs, config: LossConfig, shared: bool = False
) -> tuple[Tensor, Tensor]:
    maps = [head.mask_logits for head in heads]
    return mask_losses(maps, objects.masks, pairs, objects.limits, config, shared)


def _box_losses(
    heads: Sequence[Head], objects: Objects, pairs: Pairs, config: LossConfig, count: Tensor | float
) -> dict[str, Tensor]:
    """L1 and generalised IoU of the paired boxes, weighted, sums over `count` (DETR); none without boxes."""
    if heads[0].boxes is None:
        return {}
    boxes = torch.stack([head.query_boxes for head in heads])
    predicted = at_least_float32(boxes[pairs.heads, pairs.images, pairs.queries])
    wanted = objects.boxes[pairs.objects].to(predicted.dtype)
    distance = pairs.sums((predicted - wanted).abs().sum(1))
    giou = pairs.sums(1 - generalized_iou(predicted, wanted))
    return {"box": config.box_weight * distance / count, "giou": config.giou_weight * giou / count}
