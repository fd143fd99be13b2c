"""Boxes as (centre x, centre y, width, height) in 0..1 of the padded image, as in DETR."""

from __future__ import annotations

import torch
from torch import Tensor

from mpformer.model.noise import mask_boxes


def relative_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks [N,H,W] bool: [N,4] float32; zeros for an empty mask."""
    height, width = masks.shape[1:]
    x0, y0, x1, y1 = mask_boxes(masks).unbind(1)
    return torch.stack(
        ((x0 + x1) / (2 * width), (y0 + y1) / (2 * height), (x1 - x0) / width, (y1 - y0) / height), dim=1
    )


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU in -1..1 of boxes [...,4], whose leading dimensions are broadcast (Rezatofighi 2019).

    Two boxes without area have 0.
    """
    (low_a, high_a), (low_b, high_b) = _corners(a), _corners(b)
    overlap = _area(torch.maximum(low_a, low_b), torch.minimum(high_a, high_b))
    union = _area(low_a, high_a) + _area(low_b, high_b) - overlap
    hull = _area(torch.minimum(low_a, low_b), torch.maximum(high_a, high_b))
    tiny = torch.finfo(a.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    center, size = boxes[..., :2], boxes[..., 2:]
    return center - size / 2, center + size / 2


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)
