"""What the compiled forms of the mask losses on sampled points are given and give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SUMS = 5
"""Of a pair: counted points; sums over them of cross-entropy, probability, truth, probability * truth."""


@dataclass(frozen=True)
class MaskPairs:
    """Pairs of a predicted and a true mask, with the random points of each pair."""

    table: Tensor
    """[n,5] int32: (map, image, query, object, row). The predicted mask is `maps[map][image, query]`, each at
    most once; the true one is `masks[object]`; `row` is that of `streams` and of `kept`."""
    masks: Tensor
    """[M,H,W] bool: the true masks."""
    streams: Tensor
    """[r,4] int32, see `random_bits`: call 0 gives a pair's candidates, call 1 its uniform points, packed
    (see `mpformer.model.points.unpack`)."""
    limits: Tensor | None = None
    """[n,2] float32, (x, y) in 0..1: points at or beyond it do not count. None: all points count."""
    kept: Tensor | None = None
    """[r,important] int32, packed: the points to keep; None: each pair's least certain candidates."""


@dataclass(frozen=True)
class Points:
    """How many points there are of each pair."""

    candidates: int
    important: int
    """Candidates that are kept: those with the smallest absolute logits; of equal ones the first."""
    uniform: int


class PointKernel(Protocol):
    """Compiled forms for one kind of device; nothing they are given is empty."""

    def random_bits(self, streams: Tensor, call: int, count: int) -> Tensor: ...

    def forward(
        self, maps: Sequence[Tensor], pairs: MaskPairs, points: Points
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [2,n] float32 (mean cross-entropy, dice), sums [n,SUMS] float32 and the points that were
        kept, [n,important] int32, packed; with `pairs.kept` these are an empty tensor."""

    def backward(
        self,
        grad: Tensor,
        maps: Sequence[Tensor],
        pairs: MaskPairs,
        points: Points,
        sums: Tensor,
        kept: Tensor,
    ) -> list[Tensor]:
        """Gradients of the maps, of their shapes and types, contiguous; grad [2,n] float32, `kept` as
        `forward` returned it. Zero where no pair is."""
