"""Multi-scale deformable attention in plain PyTorch: the definition the compiled kernels are tested against.

The function is that of the Deformable-DETR operator (Zhu et al., Deformable DETR, section 4.1, equation 3),
with its behaviour for non-finite input spelled out:

    out[b, q, h] = sum over levels l and points p of  w[b, q, h, l, p] * bilinear(value_l[b, :, :, h], x, y)
    x = location_x * W_l - 0.5,   y = location_y * H_l - 0.5          (align_corners=False)

Cells outside a map count as zero (zero padding). All cells inside take part in the arithmetic, also with
weight zero: so a NaN value propagates to every sample that touches it. A NaN or infinite location gives
NaN, a finite location outside its map gives zero, however large it is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = tuple[tuple[int, int], ...]


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
    queries = sampling_locations.shape[1]
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    maps = value.to(compute).permute(0, 2, 3, 1).flatten(0, 1)  # [B*heads, D, S]
    locations = (
        sampling_locations.to(compute).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    )  # [B*heads, levels, Q, points, 2]
    weights = (
        attention_weights.to(compute).permute(0, 2, 3, 1, 4).flatten(0, 1)
    )  # [B*heads, levels, Q, points]

    finite = torch.isfinite(locations).all(-1, keepdim=True)
    # Times zero, or times NaN: carries a non-finite location into the output and into its own gradient.
    poison = torch.where(finite, 0.0, torch.nan).to(compute) * locations
    # grid_sample turns a huge coordinate into inf - inf; everything beyond [-1, 2] lies outside any map
    # anyway.
    locations = torch.where(finite, locations, -1.0).clamp(-1.0, 2.0)

    out = maps.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_map = maps[:, :, start : start + height * width].reshape(batch * heads, channels, height, width)
        start += height * width
        sampled = F.grid_sample(
            level_map, 2 * locations[:, level] - 1, padding_mode="zeros", align_corners=False
        )
        sampled = sampled + poison[:, level].sum(-1).unsqueeze(1)
        out = out + (sampled * weights[:, level].unsqueeze(1)).sum(-1)
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def sampling_from_logits(
    spatial_shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights from what the linear layers of the encoder give.

    reference_points [B or 1, Q, levels, 2], 0..1; offsets [B, Q, heads, levels, points, 2] in cells of
    their level; logits [B, Q, heads, levels, points]. location = reference + offset / (W, H); the softmax
    runs over levels and points together (Deformable DETR, section 4.1). Half types are computed in float32.
    """
    compute = torch.promote_types(torch.promote_types(offsets.dtype, reference_points.dtype), torch.float32)
    size = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=compute, device=offsets.device)
    locations = reference_points.to(compute)[:, :, None, :, None] + offsets.to(compute) / size[:, None]
    weights = logits.to(compute).flatten(-2).softmax(-1).view(logits.shape)
    return locations, weights
