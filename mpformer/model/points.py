"""Masks at points: the sampled points on which matching and mask losses are computed (Mask2Former 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, float32 and float64 unchanged: losses are computed in full precision."""
    return values if values.dtype == torch.float64 else values.float()


def unpack(points: Tensor) -> Tensor:
    """Packed points [...] int32 as (x, y) in 0..1, float32 [...,2].

    A packed point has x in its lower and y in its upper 16 bits, in units of 1/65536 of the map's width and
    height, and is the centre of its unit.
    """
    both = torch.stack((points & 0xFFFF, (points >> 16) & 0xFFFF), dim=-1)
    return both.float().add_(0.5).mul_(1 / 65536)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N,H,W] at points [N,P,2], (x, y) in 0..1 over the whole map -> [N,P].

    Outside of the map is zero. Differentiable with respect to the maps.
    """
    if maps.shape[0] == 0:
        # an empty selection stays part of the graph, so that its parameters get a (zero) gradient
        return maps.flatten(1)[:, :1].expand(0, points.shape[1])
    grid = 2 * points[:, :, None, :] - 1
    values = F.grid_sample(maps[:, None], grid.to(maps.dtype), mode="bilinear", align_corners=False)
    return values[:, 0, :, 0]


def sample_shared(maps: Tensor, points: Tensor) -> Tensor:
    """As `sample`, for maps that share their points: maps [B,N,H,W], points [B,P,2] -> [B,N,P].

    One look-up serves all N maps of an image.
    """
    if maps.shape[1] == 0:
        return maps.new_zeros(maps.shape[0], 0, points.shape[1])
    parts = _parts(maps)
    grid = (2 * points[:, None, None] - 1).to(maps.dtype).expand(-1, parts, -1, -1, -1).flatten(0, 1)
    found = F.grid_sample(
        maps.reshape(len(grid), -1, *maps.shape[2:]), grid, mode="bilinear", align_corners=False
    )
    return found.reshape(*maps.shape[:2], -1)


def _parts(maps: Tensor) -> int:
    """Into how many parts an image's maps are divided. PyTorch's look-up on the CPU has a thread for each
    image; with fewer images than threads, their parts stand for images."""
    images, each = maps.shape[:2]
    if maps.device.type != "cpu" or not images:
        return 1
    threads = -(-torch.get_num_threads() // images)
    return next((parts for parts in range(threads, each + 1) if each % parts == 0), each)


def cell_centers(size: Sequence[int], device: torch.device) -> Tensor:
    """Centres of all cells of a map of size (h, w), [h*w,2] as (x, y) in 0..1, row by row."""
    height, width = size
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=2).reshape(-1, 2)


@torch.no_grad()
def least_certain(logits: Tensor, candidates: Tensor, important: int) -> Tensor:
    """The `important` candidates nearest to the decision boundary (PointRend's importance sampling).

    logits [N,h,w]; candidates [N,C,2], (x, y) in 0..1 -> [N,important,2] in any order.
    """
    nearest = _smallest(sample(logits, candidates).abs(), important)
    return candidates.gather(1, nearest[:, :, None].expand(-1, -1, 2))


@torch.no_grad()
def sample_masks(masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """As `sample` of masks[rows], whose copies would be large: [M,H,W] bool, [n] int64, [n,P,2] -> [n,P].

    In the dtype of the points.
    """
    height, width = masks.shape[1:]
    columns, beside = _neighbours(points[..., 0], width)
    lines, above = _neighbours(points[..., 1], height)
    first = (rows * (height * width))[:, None]
    cells = first + lines[:, None] * width + columns  # [2,2,n,P]
    weights = above[:, None] * beside
    return (weights * masks.flatten()[cells]).sum((0, 1))


def _neighbours(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The cells before and after each place (0..1) of an axis of `count` cells, and their weights: [2,...].

    The weight of a cell outside of the axis is 0, and another cell stands for it.
    """
    place = places * count - 0.5
    before = place.floor()
    after = place - before
    cells = torch.stack((before, before + 1))
    weights = torch.stack((1 - after, after)) * ((cells >= 0) & (cells < count))
    return cells.clamp(0, count - 1).long(), weights


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest values of each row, in any order: [N,P] float -> [N,count] int64."""
    if values.device.type == "cpu" and 0 < count < values.shape[1]:
        # numpy's vectorised selection takes about a seventh of the time of torch's topk on a CPU
        return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count])
    return values.topk(count, dim=1, largest=False, sorted=False).indices


def inside(points: Tensor, limits: Tensor) -> Tensor:
    """Which points [...,P,2] lie in the valid upper left part of a padded image: [...,P] bool.

    limits [...,2], broadcast: (x, y) in 0..1 at which that part ends.
    """
    return (points < limits).all(-1)
