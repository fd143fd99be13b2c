"""Multi-scale deformable attention: the public operator, in a plain and a fused form."""

from torch import Tensor

from mpformer.ops.reference import Shapes, ms_deform_attn_reference, sampling_from_logits

SpatialShapes = Shapes | Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    value [B, S, heads, D]; spatial_shapes a tuple of (H, W) per level (or an integer tensor [levels, 2])
    with the sum of H * W equal to S; sampling_locations [B, Q, heads, levels, points, 2] as (x, y), 0..1
    over each map; attention_weights [B, Q, heads, levels, points]. Returns [B, Q, heads * D] in the dtype
    of `value`. Zero padding, align_corners=False; a NaN value or weight propagates, a NaN or infinite
    location gives NaN, a finite location outside gives zero. Raises ValueError where the shapes do not fit
    together.
    """
    shapes = _shapes(spatial_shapes)
    return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor, spatial_shapes: SpatialShapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`ms_deform_attn` from raw offsets and attention logits; softmax and locations are made inside.

    value [B, S, heads, D]; reference_points [B or 1, Q, levels, 2] as (x, y), 0..1; offsets
    [B, Q, heads, levels, points, 2] in cells of their level; logits [B, Q, heads, levels, points]:
    location = reference + offset / (W, H), weights = softmax over levels * points. Nothing of these is
    stored for the backward pass. Returns [B, Q, heads * D] in the dtype of `value`.
    """
    shapes = _shapes(spatial_shapes)
    return ms_deform_attn_reference(
        value, shapes, *sampling_from_logits(shapes, reference_points, offsets, logits)
    )


def _shapes(spatial_shapes: SpatialShapes) -> Shapes:
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return tuple((int(h), int(w)) for h, w in pairs)
