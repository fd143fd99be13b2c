"""Sine positions of feature maps, as in DETR and Mask2Former."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpformer.model.tables import kept_table

_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def sine_position(h: int, w: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Two-dimensional sine position [h*w,C], row by row: the first C/2 channels encode y, the others x.

    Coordinates run over (0, 2*pi]; frequencies fall geometrically to 1/10000. `channels` is a multiple of 4.
    """
    return _table(h, w, channels, str(device)).to(dtype)


@kept_table
def _table(h: int, w: int, channels: int, device: str) -> Tensor:
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    frequency = _TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angle = (steps / (count + _EPSILON) * 2 * math.pi)[:, None] / frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    y = encode(h)[:, None, :].expand(h, w, half)
    x = encode(w)[None, :, :].expand(h, w, half)
    return torch.cat((y, x), dim=2).reshape(h * w, channels)
