"""Noise on the ground-truth masks that pilots are given (MP-Former section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def point_noise(masks: Tensor, ratio: float, scores: Tensor, amounts: Tensor) -> Tensor:
    """Flip up to ratio * area cells of each mask, anywhere on the map.

    masks [N,S] bool, flattened; scores [N,S] and amounts [N] uniform in [0, 1). The number of flipped cells
    is uniform on 0..floor(ratio * area) and the cells are distinct, every choice equally likely.
    Returns [N,S] bool.
    """
    if masks.shape[0] == 0 or ratio == 0:
        return masks
    cells = masks.shape[1]
    area = masks.sum(dim=1)
    most = (ratio * area).floor().clamp(max=cells)
    count = (amounts * (most + 1)).floor().clamp(max=most).long()
    # the cells with the `count` smallest scores: scores are looked up in order only as far as can be needed
    longest = min(cells, int(ratio * cells) + 1)
    order = scores.topk(longest, dim=1, largest=False).values
    beyond = torch.full_like(order[:, :1], float("inf"))
    first_kept = torch.cat((order, beyond), dim=1).gather(1, count[:, None])
    return masks ^ (scores < first_kept)


def label_noise(labels: Tensor, classes: int, ratio: float, decisions: Tensor, choices: Tensor) -> Tensor:
    """Replace labels by another class with probability `ratio` (MP-Former section 4.4).

    labels int64 of any shape; decisions and choices of its shape, uniform in [0, 1). The new class is never
    the old one; a data set of one class has no other and stays as it is.
    """
    if classes == 1:
        return labels
    other = (labels + 1 + (choices * (classes - 1)).long().clamp(max=classes - 2)) % classes
    return torch.where(decisions < ratio, other, labels)
