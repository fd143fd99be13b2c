"""Bilinear resizing of maps as two matrix products, of which only the parts that are wanted are computed.

A resize is linear and separable: one matrix for the rows, one for the columns, with the weights of
`torch.nn.functional.interpolate(align_corners=False)`. Resizes in succession are products of such matrices.
A row of a matrix has two or three nonzero entries, side by side, so a block of rows has few columns to
multiply. Maps are stored row by row, [rows,n,columns]: n maps are resized by the same two products.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 64
"""Rows of a matrix that are multiplied at a time on CPUs. GPUs multiply zeros faster than they start."""


class Resizing:
    """The matrix [target,source] of a resize of one axis; `flipped`: its rows in reverse order."""

    def __init__(self, matrix: Tensor, device: torch.device, flipped: bool = False) -> None:
        used = matrix.numpy() != 0  # on the CPU, where the matrix was made: no wait for a GPU
        self._starts: list[int] = used.argmax(1).tolist()
        self._stops: list[int] = (matrix.shape[1] - used[:, ::-1].argmax(1)).tolist()
        self._flipped = flipped
        self.matrix = (matrix.flip(0) if flipped else matrix).to(device)
        self._block = _BLOCK if device.type == "cpu" else len(matrix)

    def sources(self, targets: slice) -> slice:
        """The source cells that the targets depend on."""
        last = len(self._starts) - 1
        ends = targets.start, targets.stop - 1
        low, high = (last - ends[1], last - ends[0]) if self._flipped else ends
        return slice(self._starts[low], self._stops[high])

    def targets(self, sources: slice) -> slice:
        """The targets that depend on one of the source cells. Not for a flipped resize."""
        first, stop = bisect_right(self._stops, sources.start), bisect_left(self._starts, sources.stop)
        return slice(first, max(first, stop))

    def multiply(self, targets: slice, maps: Tensor, out: Tensor) -> None:
        """`out` [targets,n] = matrix[targets] @ the whole source, of which `maps` are the rows in use."""
        offset = self.sources(targets).start
        for block in blocks(targets, self._block):
            used = self.sources(block)
            torch.mm(
                self.matrix[block, used],
                maps[used.start - offset : used.stop - offset],
                out=out[block.start - targets.start : block.stop - targets.start],
            )


def blocks(whole: slice, step: int) -> Iterator[slice]:
    """The parts of a slice, of length `step`; the last may be shorter."""
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def resized(maps: Tensor, rows: Resizing, top: slice, columns: Resizing, left: slice) -> Tensor:
    """The part [top,n,left] of the resized maps [y,n,x], of which `maps` are the cells in use."""
    height, (_, count, width) = top.stop - top.start, maps.shape
    narrow = maps.new_empty(height, count * width)
    rows.multiply(top, maps.reshape(len(maps), count * width), narrow)
    result = maps.new_empty(height * count, left.stop - left.start)
    columns.multiply(left, narrow.view(height * count, width).T, result.T)
    return result.view(height, count, left.stop - left.start)


def bilinear(source: int, target: int) -> Tensor:
    """[target,source]: the matrix of a bilinear resize of one axis, which is the resized identity."""
    identity = torch.eye(source)
    if source == target:
        return identity
    return F.interpolate(identity[None, None], (target, source), mode="bilinear", align_corners=False)[0, 0]


def to_original(source: int, padded: int, valid: int, original: int) -> Tensor:
    """[original,source]: resize to the padded size, crop to the valid one, resize to the original."""
    up = bilinear(source, padded)[:valid]
    if valid == original:
        return up
    down = Resizing(bilinear(valid, original), torch.device("cpu"))
    whole = slice(0, original)
    both = torch.empty(original, source)
    down.multiply(whole, up[down.sources(whole)], both)
    return both
