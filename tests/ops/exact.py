"""Multi-scale deformable attention in float64 loops, written from the formula, not from our code."""

import math

import numpy as np


def forward_and_gradients(value, shapes, locations, weights, grad):
    """Output, and the gradients of value, locations and weights for the output gradient `grad`.

    All numpy float64: value [B, S, heads, D], locations [B, Q, heads, levels, points, 2], weights
    [B, Q, heads, levels, points], grad [B, Q, heads, D]; output [B, Q, heads, D].
    """
    batch, queries, heads, _, points = weights.shape
    output = np.zeros((batch, queries, heads, value.shape[-1]))
    grad_value, grad_locations, grad_weights = (np.zeros(x.shape) for x in (value, locations, weights))
    starts = np.cumsum([0] + [h * w for h, w in shapes])
    with np.errstate(all="ignore"):
        for b, q, h in np.ndindex(batch, queries, heads):
            g = grad[b, q, h]
            for level, (height, width) in enumerate(shapes):
                for p in range(points):
                    weight = weights[b, q, h, level, p]
                    x, y = locations[b, q, h, level, p]
                    if not (math.isfinite(x) and math.isfinite(y)):
                        output[b, q, h] += np.nan
                        grad_weights[b, q, h, level, p] = np.nan
                        grad_locations[b, q, h, level, p] = np.nan
                        continue
                    x, y = x * width - 0.5, y * height - 0.5
                    if not (-1 < x < width and -1 < y < height):
                        output[b, q, h] += weight * 0.0
                        grad_weights[b, q, h, level, p] = (g * 0.0).sum()
                        continue
                    left, top = math.floor(x), math.floor(y)
                    sample = np.zeros(value.shape[-1])
                    slope_x = slope_y = 0.0
                    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                        if not (0 <= column < width and 0 <= row < height):
                            continue
                        in_x, in_y = 1 - abs(x - column), 1 - abs(y - row)
                        cell = (b, starts[level] + row * width + column, h)
                        sample += in_x * in_y * value[cell]
                        grad_value[cell] += weight * in_x * in_y * g
                        slope_x += (1 if column > left else -1) * in_y * (g @ value[cell])
                        slope_y += (1 if row > top else -1) * in_x * (g @ value[cell])
                    output[b, q, h] += weight * sample
                    grad_weights[b, q, h, level, p] = g @ sample
                    grad_locations[b, q, h, level, p] = weight * width * slope_x, weight * height * slope_y
    return output, grad_value, grad_locations, grad_weights


def fused_forward_and_gradients(value, shapes, reference, offsets, logits, grad):
    """The same from reference points [B, Q, levels, 2], offsets in cells, logits; gradients of those."""
    size = np.array([(w, h) for h, w in shapes], dtype=np.float64)[:, None]
    flat = logits.reshape(*logits.shape[:3], logits.shape[3] * logits.shape[4])
    e = np.exp(flat - flat.max(-1, keepdims=True)) if flat.size else flat
    weights = e / e.sum(-1, keepdims=True)
    locations = reference[:, :, None, :, None] + offsets / size
    output, grad_value, grad_locations, grad_weights = forward_and_gradients(
        value, shapes, locations, weights.reshape(logits.shape), grad
    )
    g = grad_weights.reshape(flat.shape)
    grad_logits = weights * (g - (weights * g).sum(-1, keepdims=True))
    return output, grad_value, grad_locations / size, grad_logits.reshape(logits.shape)
