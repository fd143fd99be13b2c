"""Losses of per-pixel models: PerPixelBaseline and PerPixelBaseline+ (MaskFormer section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.model.mask_losses import dice_loss, pointwise_mask_loss
from mpformer.model.objects import Objects, in_a_row
from mpformer.model.points import at_least_float32
from mpformer.model.transfer import to_device
from mpformer.types import Head, Target

_UNLABELLED = -100
"""The label that cross-entropy ignores."""


def labelled_pixels(targets: Sequence[Target]) -> Tensor:
    """How many pixels belong to an object, a scalar."""
    return (_label_maps(in_a_row(targets)) != _UNLABELLED).sum()


def per_pixel_losses(
    heads: Sequence[Head],
    objects: Objects,
    pixels: Tensor | float,
    queries: Tensor | float,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Weighted losses of each head, on all labelled pixels at the targets' size, [L] each.

    {'pixel'}: mean cross-entropy over the `pixels` of the global batch; or {'mask', 'dice'}: mean over its
    `queries`, the class maps, which are empty for classes that an image lacks. Pixels of no object are not
    counted.
    """
    labels = _label_maps(objects)
    if config.per_pixel == "cross_entropy":
        return {"pixel": torch.stack([_cross_entropy(head, labels) for head in heads]) / pixels}
    classes = heads[0].mask_logits.shape[1]
    maps = _class_maps(objects, classes)
    counted = (labels != _UNLABELLED)[:, None]
    each = [_mask_and_dice(head, maps, counted, config) for head in heads]
    mask, dice = (torch.stack(of_heads) for of_heads in zip(*each))
    return {"mask": config.mask_weight * mask / queries, "dice": config.dice_weight * dice / queries}


def _cross_entropy(head: Head, labels: Tensor) -> Tensor:
    logits = _resized(head, labels.shape[1:])
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=_UNLABELLED)


def _mask_and_dice(head: Head, maps: Tensor, counted: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    logits = _resized(head, maps.shape[2:])
    both = logits.flatten(2), maps.flatten(2).to(logits.dtype)
    weights = counted.flatten(2).to(logits.dtype)
    return pointwise_mask_loss(*both, weights, config).sum(), dice_loss(*both, weights).sum()


def _resized(head: Head, size: Sequence[int]) -> Tensor:
    logits = at_least_float32(head.mask_logits)
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _label_maps(objects: Objects) -> Tensor:
    """[B,H,W] int64: each pixel's class, where objects overlap that of the last one."""
    rows = torch.arange(1, len(objects.labels) + 1, dtype=torch.int32, device=objects.masks.device)
    numbered = objects.masks * rows[:, None, None]
    last = _largest(numbered, _images(objects), len(objects.counts))
    return F.pad(objects.labels, (1, 0), value=_UNLABELLED)[last]


def _class_maps(objects: Objects, classes: int) -> Tensor:
    """[B,K,H,W] bool: the pixels of each class."""
    place = _images(objects) * classes + objects.labels
    maps = _largest(objects.masks.byte(), place, len(objects.counts) * classes)
    return maps.unflatten(0, (-1, classes)) > 0


def _largest(values: Tensor, places: Tensor, count: int) -> Tensor:
    """The largest value that goes to each place, else 0: values [M,H,W], places [M] -> [count,H,W]."""
    result = values.new_zeros(count, *values.shape[1:])
    return result.scatter_reduce_(0, places[:, None, None].expand_as(values), values, "amax")


def _images(objects: Objects) -> Tensor:
    return to_device(torch.from_numpy(objects.images), objects.masks.device)
