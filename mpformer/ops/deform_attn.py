"""Multi-scale deformable attention: the public operator, in a plain and a fused form.

Both forms are one operator of `torch.library`, `mpformer::ms_deform_attn`, with fake, autograd and autocast
rules: `torch.compile` sees one node. Which code runs is decided per device in mpformer/ops/kernels.py.
Programs that `torch.export` makes are for places where there is no such operator: they get `portable`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpformer.ops.kernels import kernel_for
from mpformer.ops.portable import ms_deform_attn_portable
from mpformer.ops.reference import (
    Shapes,
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
    sampling_from_logits,
    sampling_from_logits_backward,
)

SpatialShapes = Sequence[Sequence[int]] | Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    value [B, S, heads, D]; spatial_shapes ((H, W), ...) per level as integers (or as an integer tensor
    [levels, 2], which costs a device synchronisation), the sum of H * W being S; sampling_locations
    [B, Q, heads, levels, points, 2] as (x, y), 0..1 over each map; attention_weights
    [B, Q, heads, levels, points]. Returns [B, Q, heads * D] in the dtype of `value`.

    Zero padding, align_corners=False. A NaN value or weight propagates, a NaN or infinite location gives NaN,
    a finite location outside gives zero. float32, bfloat16 and float16 are accumulated in float32, float64 in
    float64; under autocast `value` is cast, locations and weights keep their precision. Raises ValueError
    where shapes do not fit together, TypeError for a dtype that is not a float.
    """
    shapes = _flat_shapes(spatial_shapes)
    _check(value, shapes, None, sampling_locations, attention_weights)
    if torch.compiler.is_exporting():
        return ms_deform_attn_portable(value, shapes, None, sampling_locations, attention_weights)
    return _operator(value, shapes, None, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor, spatial_shapes: SpatialShapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`ms_deform_attn` from raw offsets and attention logits; softmax and locations are made inside.

    value [B, S, heads, D]; reference_points [B or 1, Q, levels, 2] as (x, y), 0..1; offsets
    [B, Q, heads, levels, points, 2] in cells of their level; logits [B, Q, heads, levels, points]:
    location = reference + offset / (W, H), weights = softmax over levels * points. Nothing of these is stored
    for the backward pass. Returns [B, Q, heads * D] in the dtype of `value`. Otherwise as `ms_deform_attn`.
    """
    shapes = _flat_shapes(spatial_shapes)
    _check(value, shapes, reference_points, offsets, logits)
    if torch.compiler.is_exporting():
        return ms_deform_attn_portable(value, shapes, reference_points, offsets, logits)
    return _operator(value, shapes, reference_points, offsets, logits)


def _flat_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [int(side) for pair in pairs for side in pair]


def _pairs(flat: Sequence[int]) -> Shapes:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _check(
    value: Tensor, shapes: list[int], reference: Tensor | None, points: Tensor, weights: Tensor
) -> None:
    first, second = (
        ("sampling_locations", "attention_weights") if reference is None else ("offsets", "logits")
    )
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, heads, D], not {list(value.shape)}")
    if weights.ndim != 5:
        raise ValueError(f"{second} must be [B, Q, heads, levels, points], not {list(weights.shape)}")
    batch, queries, heads, levels, _ = weights.shape
    if points.shape != (*weights.shape, 2):
        raise ValueError(f"{first} must be {[*weights.shape, 2]} beside {second}, not {list(points.shape)}")
    if value.shape[0] != batch or value.shape[2] != heads:
        raise ValueError(
            f"value has {value.shape[0]} images and {value.shape[2]} heads, {second} {batch} and {heads}"
        )
    if len(shapes) != 2 * levels or min(shapes, default=1) < 1:
        raise ValueError(f"spatial_shapes must be {levels} pairs (H, W) of at least 1, not {shapes}")
    cells = sum(h * w for h, w in _pairs(shapes))
    if cells != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} rows, spatial_shapes give {cells}")
    if reference is not None and (
        reference.ndim != 4
        or reference.shape[0] not in (1, batch)
        or reference.shape[1:] != (queries, levels, 2)
    ):
        raise ValueError(
            f"reference_points must be [{batch} or 1, {queries}, {levels}, 2], not {list(reference.shape)}"
        )
    tensors = (value, points, weights) if reference is None else (value, points, weights, reference)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"ms_deform_attn takes float tensors, not {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"ms_deform_attn: value is on {value.device}, another tensor on {tensor.device}")


# ---- the operator. `shapes` is flat (H, W, H, W, ...); without `reference`, points are locations and weights
# are attention weights, with it they are offsets and logits.


@torch.library.custom_op("mpformer::ms_deform_attn", mutates_args=())
def _operator(
    value: Tensor, shapes: Sequence[int], reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    if value.numel() == 0 or weights.numel() == 0:
        return value.new_zeros(batch, queries, heads * value.shape[-1])
    pairs, kernel = _pairs(shapes), kernel_for(value)
    if kernel is not None:
        return kernel.forward(value, pairs, reference, points, weights)
    if reference is not None:
        points, weights = sampling_from_logits(pairs, reference, points, weights)
    return ms_deform_attn_reference(value, pairs, points, weights).contiguous()


@_operator.register_fake
def _(
    value: Tensor, shapes: Sequence[int], reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], weights.shape[2] * value.shape[-1])


@torch.library.custom_op("mpformer::ms_deform_attn_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor | None,
    points: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, points, weights)
    if value.numel() == 0 or weights.numel() == 0:
        no_value, no_points, no_weights = (
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in inputs
        )
        return no_value, no_points, no_weights
    pairs, kernel = _pairs(shapes), kernel_for(value)
    if kernel is not None:
        return kernel.backward(grad, value, pairs, reference, points, weights)
    if reference is None:
        grads = ms_deform_attn_reference_backward(grad, value, pairs, points, weights)
    else:
        locations, softmax = sampling_from_logits(pairs, reference, points, weights)
        grad_value, *of_sampling = ms_deform_attn_reference_backward(grad, value, pairs, locations, softmax)
        grads = (grad_value, *sampling_from_logits_backward(pairs, softmax, *of_sampling))
    grad_value, grad_points, grad_weights = (
        g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True)
    )
    return grad_value, grad_points, grad_weights


@_operator_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    reference: Tensor | None,
    points: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), points.new_empty(points.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, reference, points, weights = inputs
    ctx.save_for_backward(value, reference, points, weights)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, points, weights = ctx.saved_tensors
    grad_value, grad_points, grad_weights = _operator_backward(
        grad, value, ctx.shapes, reference, points, weights
    )
    grad_reference = None
    if reference is not None and ctx.needs_input_grad[2]:
        # A reference point moves all points of its level; offsets are in cells, it is in parts of the map.
        sizes = torch.tensor([(w, h) for h, w in _pairs(ctx.shapes)], dtype=torch.float32, device=grad.device)
        moved = grad_points.to(torch.promote_types(grad_points.dtype, torch.float32)).sum((2, 4)) * sizes
        grad_reference = moved.sum_to_size(reference.shape).to(reference.dtype)
    return grad_value, None, grad_reference, grad_points, grad_weights


_operator.register_autograd(_differentiate, setup_context=_save)


def _register_autocast(device: str, key: str) -> None:
    def cast(
        value: Tensor, shapes: Sequence[int], reference: Tensor | None, points: Tensor, weights: Tensor
    ) -> Tensor:
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _operator(value, shapes, reference, points, weights)

    _LIBRARY.impl("ms_deform_attn", cast, key)


# Only the values may lose precision: a location in a half type is off by up to a tenth of a cell or more.
_LIBRARY = torch.library.Library("mpformer", "FRAGMENT")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
