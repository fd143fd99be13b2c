"""Masks at points: the sampled points on which matching and mask losses are computed (Mask2Former 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.model import Loss as LossConfig
from mpformer.config.model import PointCounts
from mpformer.model.streams import SampleRandom


@dataclass(frozen=True)
class HeadPoints:
    """The random points of one head, image by image."""

    matching: tuple[Tensor | None, ...]
    """[P,2] float32, (x, y) in 0..1: shared by all pairs of an image; None where matching needs none."""
    losses: tuple[tuple[Tensor, Tensor], ...]
    """Candidates and uniform points of each pair, [n,...] int32, packed (`unpack`); empty for full masks."""


def draw_points(
    pairs: Sequence[int], config: LossConfig, draws: SampleRandom, *, matching: bool
) -> HeadPoints:
    """Draw the points of a head for images with that many pairs; matching: whether it is matched at all.

    An image's stream yields the points of matching first, then those of the losses, head after head.
    """
    images = range(len(pairs))
    shared = tuple(matching_points(config, draws, b) if matching else None for b in images)
    counts = config.point_counts()
    if counts is None:
        return HeadPoints(shared, ())
    return HeadPoints(shared, tuple(loss_points(pairs[b], counts, draws, b) for b in images))


def matching_points(config: LossConfig, draws: SampleRandom, b: int) -> Tensor | None:
    """[P,2] float32; None where the cost needs no random points."""
    count = config.for_matching().points
    if config.assignment == "fixed" or config.match_by == "boxes" or count is None:
        return None
    return draws.uniform(b, count, 2)


def loss_points(masks: int, counts: PointCounts, draws: SampleRandom, b: int) -> tuple[Tensor, Tensor]:
    """Candidates and uniform points of an image's masks, packed: [masks,...] int32 both."""
    return draws.points(b, masks, counts.candidates), draws.points(b, masks, counts.uniform)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, float32 and float64 unchanged: losses are computed in full precision."""
    return values if values.dtype == torch.float64 else values.float()


def unpack(points: Tensor) -> Tensor:
    """Packed points [...] int32 as (x, y) in 0..1, float32 [...,2].

    A packed point has x in its lower and y in its upper 16 bits, in units of 1/65536 of the map's width and
    height, and is the centre of its unit. A point takes 4 bytes instead of 8, and a random number of 64 bits
    gives two of them.
    """
    both = torch.stack((points & 0xFFFF, (points >> 16) & 0xFFFF), dim=-1)
    return (both.float() + 0.5) / 65536


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
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps, grid.to(maps.dtype), mode="bilinear", align_corners=False)[:, :, 0]


def cell_centers(size: Sequence[int], device: torch.device) -> Tensor:
    """Centres of all cells of a map of size (h, w), [h*w,2] as (x, y) in 0..1, row by row."""
    height, width = size
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=2).reshape(-1, 2)


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: Tensor, uniform: Tensor, important: int) -> Tensor:
    """Points for the mask losses (PointRend's importance sampling): [N,P,2].

    logits [N,H,W]; candidates [N,oversample*P,2] and uniform [N,P-important,2], random in 0..1. Of the
    candidates the `important` ones nearest to the decision boundary are kept; `uniform` completes them.
    """
    distance = sample(logits.detach(), candidates).abs()
    nearest = _smallest(distance, important)
    kept = candidates.gather(1, nearest[:, :, None].expand(-1, -1, 2))
    return torch.cat((kept, uniform), dim=1)


@torch.no_grad()
def least_certain(logits: Tensor, candidates: Tensor, important: int) -> Tensor:
    """The `important` candidates nearest to the decision boundary, [N,important], packed as they were.

    logits [N,H,W]; candidates [N,...] int32, packed points.
    """
    distance = sample(logits.detach(), unpack(candidates)).abs()
    return candidates.gather(1, _smallest(distance, important))


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest values of each row, in any order: [N,P] float -> [N,count] int64."""
    if values.device.type == "cpu" and 0 < count < values.shape[1]:
        # numpy's vectorised selection takes about a seventh of the time of torch's topk on a CPU
        return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count])
    return values.topk(count, dim=1, largest=False, sorted=False).indices


def inside(points: Tensor, valid_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """Which points [...,P,2] lie in the valid upper left part of an image padded to `size`: [...,P] bool."""
    x, y = points.unbind(-1)
    return (x < valid_size[1] / size[1]) & (y < valid_size[0] / size[0])
