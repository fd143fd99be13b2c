"""Multi-scale deformable attention in plain PyTorch: the definition the compiled kernels are tested against.

The function is that of the Deformable-DETR operator (Zhu et al., Deformable DETR, section 4.1, equation 3),
with its behaviour for non-finite input spelled out:

    out[b, q, h] = sum over levels l and points p of  w[b, q, h, l, p] * bilinear(value_l[b, :, :, h], x, y)
    x = location_x * W_l - 0.5,   y = location_y * H_l - 0.5          (align_corners=False)

Cells outside a map count as zero (zero padding). All cells inside take part in the arithmetic, also with
weight zero: so a NaN value propagates to every sample that touches it. A NaN or infinite location gives NaN,
a finite location outside its map gives zero, however large it is.

The backward pass is written out, because the operator that calls it runs below autograd.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]

_BILINEAR, _ZEROS, _ALIGN_CORNERS = 0, 0, False  # grid_sampler_2d's codes


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample `value` at `sampling_locations` on every level and sum with `attention_weights`.

    value [B, S, heads, D]; spatial_shapes ((H, W), ...) with sum of H * W equal to S; sampling_locations
    [B, Q, heads, levels, points, 2] as (x, y), 0..1 over each map; attention_weights [B, Q, heads, levels,
    points]. Any float dtype; half types are computed in float32. Returns [B, Q, heads * D] in the dtype of
    `value`.
    """
    batch, _, heads, channels = value.shape
    weights = _by_head(attention_weights, value)
    out = weights.new_zeros(batch * heads, channels, weights.shape[2])
    for level, (level_map, grid, poison) in enumerate(_levels(value, spatial_shapes, sampling_locations)):
        sampled = torch.grid_sampler_2d(level_map, grid, _BILINEAR, _ZEROS, _ALIGN_CORNERS) + poison
        out = out + (sampled * weights[:, level].unsqueeze(1)).sum(-1)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def ms_deform_attn_reference_backward(
    grad: Tensor, value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, sampling_locations and attention_weights for `grad` [B, Q, heads * D].

    A location that is not finite gets NaN, one outside its map zero. Each in the dtype of its input.
    """
    batch, _, heads, channels = value.shape
    weights = _by_head(attention_weights, value)
    grad = grad.to(weights.dtype).unflatten(-1, (heads, channels)).permute(0, 2, 3, 1).flatten(0, 1)
    grad_maps, grad_locations, grad_weights = [], [], []
    for level, (level_map, grid, poison) in enumerate(_levels(value, spatial_shapes, sampling_locations)):
        sampled = torch.grid_sampler_2d(level_map, grid, _BILINEAR, _ZEROS, _ALIGN_CORNERS) + poison
        grad_weights.append((sampled * grad.unsqueeze(-1)).sum(1))
        grad_sampled = weights[:, level].unsqueeze(1) * grad.unsqueeze(-1)
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_sampled, level_map, grid, _BILINEAR, _ZEROS, _ALIGN_CORNERS, (True, True)
        )
        grad_maps.append(grad_map.flatten(2))
        grad_locations.append(2 * grad_grid + poison.squeeze(1).unsqueeze(-1))

    def in_order(per_head: Tensor, like: Tensor) -> Tensor:  # [B*heads, levels, Q, ...] as the caller had it
        return per_head.unflatten(0, (batch, heads)).transpose(2, 3).transpose(1, 2).to(like.dtype)

    grad_value = torch.cat(grad_maps, -1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).to(value.dtype)
    return (
        grad_value,
        in_order(torch.stack(grad_locations, 1), sampling_locations),
        in_order(torch.stack(grad_weights, 1), attention_weights),
    )


def _by_head(tensor: Tensor, value: Tensor) -> Tensor:
    """[B, Q, heads, levels, ...] as [B*heads, levels, Q, ...] in the dtype of the computation."""
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    return tensor.to(compute).transpose(1, 2).transpose(2, 3).flatten(0, 1)


def _levels(value: Tensor, shapes: Shapes, locations: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per level the map [B*heads, D, H, W], grid_sample's grid, and a poison [B*heads, 1, Q, points].

    The poison is zero, and NaN where a location is not finite.
    """
    locations = _by_head(locations, value)
    maps = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)
    finite = torch.isfinite(locations).all(-1, keepdim=True)
    poison = torch.where(finite, 0.0, torch.nan).to(locations.dtype).squeeze(-1)
    # grid_sample turns a huge coordinate into inf - inf; all beyond [-1, 2] lies outside any map anyway.
    grid = 2 * torch.where(finite, locations, -1.0).clamp(-1.0, 2.0) - 1
    start = 0
    for level, (height, width) in enumerate(shapes):
        level_map = maps[:, :, start : start + height * width].unflatten(-1, (height, width))
        start += height * width
        yield level_map, grid[:, level], poison[:, level].unsqueeze(1)


def sampling_from_logits(
    spatial_shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights from what the linear layers of the encoder give.

    reference_points [B or 1, Q, levels, 2], 0..1; offsets [B, Q, heads, levels, points, 2] in cells of
    their level; logits [B, Q, heads, levels, points]. location = reference + offset / (W, H); the softmax
    runs over levels and points together (Deformable DETR, section 4.1). Half types are computed in float32.
    """
    compute = torch.promote_types(torch.promote_types(offsets.dtype, reference_points.dtype), torch.float32)
    locations = reference_points.to(compute)[:, :, None, :, None] + offsets.to(compute) / _size(
        spatial_shapes, offsets.device, compute
    )
    weights = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return locations, weights.flatten(-2).softmax(-1).view(logits.shape)


def sampling_from_logits_backward(
    spatial_shapes: Shapes, weights: Tensor, grad_locations: Tensor, grad_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of offsets and logits from those of the locations and of `weights`, the softmax's output."""
    grad_offsets = grad_locations / _size(spatial_shapes, grad_locations.device, grad_locations.dtype)
    mean = (weights * grad_weights).sum((-2, -1), keepdim=True)
    return grad_offsets, weights * (grad_weights - mean)


def _size(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(W, H) per level, [levels, 1, 2]."""
    return torch.tensor([(w, h) for h, w in shapes], dtype=dtype, device=device).unsqueeze(1)
