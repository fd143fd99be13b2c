"""Window attention at any input size, as the official Swin detectors compute it.

timm shifts a map and then pads it to whole windows; the official code pads first. At sizes that are no
multiple of the window the shifted windows then hold other cells, and weights trained with one do not fit
the other exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.model.tables import kept_table


class PadThenShift:
    """Replaces the window attention of timm's Swin block, which has these attributes."""

    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    attn: Any  # timm's WindowAttention, whatever its class there

    def _attn(self, x: Tensor) -> Tensor:
        """x [B,h,w,C], normed -> [B,h,w,C]."""
        _, height, width, _ = x.shape
        window, shift = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
            mask = _shift_mask((x.shape[1], x.shape[2]), window, shift, str(x.device), x.dtype)
        rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
        x = self.attn(_to_windows(x, window), mask=mask)
        x = x.unflatten(0, (-1, rows, columns)).unflatten(3, window)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :height, :width]


def _to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B,h,w,C], h and w multiples of the window's -> [B*windows,window cells,C], row by row."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@kept_table
def _shift_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: str, dtype: torch.dtype
) -> Tensor:
    """[windows,window cells,window cells]: -100 between cells that only the shift brought into one window."""

    def region(count: int, window: int, shift: int) -> Tensor:
        # 0 for whole windows, 1 and 2 for the two parts of the last one, which the shift brought together
        position = torch.arange(count, device=device)
        return (position >= count - window).int() + (position >= count - shift).int()

    by_row, by_column = (region(*axis) for axis in zip(size, window, shift))
    regions = 3 * by_row[:, None] + by_column[None, :]
    cells = _to_windows(regions[None, :, :, None], window)
    return torch.where(cells != cells.transpose(1, 2), -100.0, 0.0).to(dtype)
