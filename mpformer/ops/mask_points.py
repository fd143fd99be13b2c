"""Mask losses on sampled points, of all heads and images in one pass over each predicted mask.

The definition is the plain PyTorch path of `mpformer.model.mask_losses`: candidates are looked up in the
predicted mask, the least certain of them are kept, cross-entropy and dice are taken at the kept and at
uniform points. Composed of torch's operators that moves some hundred bytes per point through memory, again
for the gradient. Here a mask stays in the cache of one core or multiprocessor, the random points are made
where they are used, and only the kept ones are stored in between. Forward and backward are operators of
`torch.library`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpformer.ops.kernels import point_kernel
from mpformer.ops.mask_pairs import SUMS, MaskPairs, PointKernel, Points


def has_kernel(maps: Tensor) -> bool:
    """Whether `mask_point_losses` runs on maps like these; otherwise the plain path is to run."""
    return maps.device.type == "meta" or point_kernel(maps) is not None


def mask_point_losses(maps: Sequence[Tensor], pairs: MaskPairs, points: Points) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and dice loss of each pair: two times [n] float32.

    maps: predicted masks [B,Q,h,w] of each head, of one shape and dtype (float32, bfloat16 or float16; sums
    are in float32); differentiable once.
    """
    return _Losses.apply(pairs, points, *maps)


def least_certain(maps: Tensor, streams: Tensor, points: Points) -> Tensor:
    """The candidates that are kept of each map: [m,h,w] float -> [m,important] int32, packed."""
    number = torch.arange(len(maps), dtype=torch.int32, device=maps.device)
    zero = torch.zeros_like(number)
    table = torch.stack((zero, zero, number, zero, number), dim=1)
    no_mask = torch.zeros(1, 1, 1, dtype=torch.bool, device=maps.device)
    return _forward(
        [maps[None]], table, no_mask, streams, None, None, points.candidates, points.important, 0
    )[2]


@torch.library.custom_op("mpformer::mask_point_losses", mutates_args=())
def _forward(
    maps: Sequence[Tensor],
    table: Tensor,
    masks: Tensor,
    streams: Tensor,
    limits: Tensor | None,
    kept: Tensor | None,
    candidates: int,
    important: int,
    uniform: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if len(table) == 0:
        return _forward_fake(maps, table, masks, streams, limits, kept, candidates, important, uniform)
    pairs, points = MaskPairs(table, masks, streams, limits, kept), Points(candidates, important, uniform)
    return _kernel(maps[0]).forward(maps, pairs, points)


@_forward.register_fake
def _forward_fake(
    maps: Sequence[Tensor],
    table: Tensor,
    masks: Tensor,
    streams: Tensor,
    limits: Tensor | None,
    kept: Tensor | None,
    candidates: int,
    important: int,
    uniform: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = len(table)
    losses = table.new_empty(2, pairs, dtype=torch.float32)
    sums = table.new_empty(pairs, SUMS, dtype=torch.float32)
    return losses, sums, table.new_empty(pairs if kept is None else 0, important)


@torch.library.custom_op("mpformer::mask_point_losses_backward", mutates_args=())
def _backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    table: Tensor,
    masks: Tensor,
    streams: Tensor,
    limits: Tensor | None,
    kept: Tensor | None,
    sums: Tensor,
    chosen: Tensor,
    candidates: int,
    important: int,
    uniform: int,
) -> list[Tensor]:
    if len(table) == 0:
        return [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in maps]
    pairs, points = MaskPairs(table, masks, streams, limits, kept), Points(candidates, important, uniform)
    return _kernel(maps[0]).backward(grad.contiguous(), maps, pairs, points, sums, chosen)


@_backward.register_fake
def _(
    grad: Tensor,
    maps: Sequence[Tensor],
    table: Tensor,
    masks: Tensor,
    streams: Tensor,
    limits: Tensor | None,
    kept: Tensor | None,
    sums: Tensor,
    chosen: Tensor,
    candidates: int,
    important: int,
    uniform: int,
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in maps]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: MaskPairs, points: Points, *maps: Tensor) -> tuple[Tensor, Tensor]:
        rest = (pairs.table, pairs.masks, pairs.streams, pairs.limits, pairs.kept)
        counts = (points.candidates, points.important, points.uniform)
        losses, sums, chosen = _forward(list(maps), *rest, *counts)
        ctx.counts, ctx.maps = counts, len(maps)
        ctx.save_for_backward(*maps, *rest, sums, chosen)
        cross_entropy, dice = losses.unbind(0)
        return cross_entropy, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cross_entropy: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.stack((grad_cross_entropy, grad_dice))
        saved = ctx.saved_tensors
        grads = _backward(grad, list(saved[: ctx.maps]), *saved[ctx.maps :], *ctx.counts)
        return None, None, *grads


def _kernel(maps: Tensor) -> PointKernel:
    kernel = point_kernel(maps)
    if kernel is None:
        raise RuntimeError(f"mask_point_losses: no kernel for {maps.dtype} on {maps.device}")
    return kernel
