"""Multi-scale deformable attention in operations that other programs have, for graphs that leave torch.

`torch.export` finds it in the operator's place (`deform_attn`), and so does `mpformer export`. It is the
function of `reference` for finite locations. ONNX Runtime's GridSample gave its values to 4e-7 in float32,
also up to 10,000 maps outside, and took 0.4 to 1.1 times as long as look-ups with explicit bilinear weights,
which ONNX could hold, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def ms_deform_attn_portable(
    value: Tensor, shapes: Sequence[int], reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    """The operator `mpformer::ms_deform_attn`, with its arguments, for any number of images.

    `shapes` is flat (H, W, H, W, ...); without `reference`, points are locations and weights are attention
    weights, with it they are offsets and logits. One dtype throughout.
    """
    batch, _, heads, channels = value.shape
    queries = weights.shape[1]
    if reference is not None:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    shares = weights.permute(0, 2, 3, 1, 4).reshape(batch * heads, -1, queries, weights.shape[4])
    points = points.permute(0, 2, 3, 1, 4, 5).reshape(batch * heads, -1, queries, weights.shape[4], 2)
    mixed, first = [], 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        places = points[:, level]
        if reference is not None:
            size = places.new_tensor([width, height])
            at = reference[:, None, :, level, None].expand(batch, heads, queries, 1, 2)
            places = at.reshape(batch * heads, queries, 1, 2) + places / size
        level_map = maps[:, :, first : first + height * width].unflatten(2, (height, width))
        sampled = F.grid_sample(level_map, 2 * places - 1, "bilinear", "zeros", align_corners=False)
        mixed.append((sampled * shares[:, level, None]).sum(3))
        first += height * width
    return sum(mixed[1:], mixed[0]).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)
