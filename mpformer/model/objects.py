"""The ground truth of a micro-batch as losses, matching and pilots take it: all objects in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mpformer.model.boxes import relative_boxes
from mpformer.types import Batch, Target


@dataclass(frozen=True)
class Objects:
    """All objects of a micro-batch, image after image; M of all images together."""

    labels: Tensor
    """[M] int64 in 0..K-1."""
    masks: Tensor
    """[M,H,W] bool."""
    counts: tuple[int, ...]
    """Objects of each image."""
    limits: np.ndarray
    """[B,2] float32: (x, y) in 0..1 at which the valid upper left part of each padded image ends."""

    @cached_property
    def starts(self) -> np.ndarray:
        """[B] int64: the first object of each image."""
        return np.cumsum((0, *self.counts))[:-1]

    @cached_property
    def images(self) -> np.ndarray:
        """[M] int64: the image of each object."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def numbers(self) -> np.ndarray:
        """[M] int64: the number of each object within its image."""
        return np.arange(len(self.images)) - self.starts[self.images]

    @cached_property
    def padded(self) -> np.ndarray:
        """[B,N] int64 for the largest N: the objects of each image, then 0 as padding."""
        number = np.arange(max(self.counts, default=0))
        there = number < np.array(self.counts)[:, None]
        return np.where(there, self.starts[:, None] + number, 0)

    @cached_property
    def boxes(self) -> Tensor:
        """[M,4] float32: see `relative_boxes`."""
        return relative_boxes(self.masks)


def objects_of(batch: Batch) -> Objects:
    """The ground truth of a batch."""
    return in_a_row(batch.targets, batch.valid_sizes)


def in_a_row(targets: Sequence[Target], valid_sizes: Sequence[tuple[int, int]] | None = None) -> Objects:
    """The objects of these images; valid_sizes (height, width): None for images without padding."""
    height, width = targets[0].masks.shape[1:]
    sizes = valid_sizes or [(height, width)] * len(targets)
    limits = np.array([(w / width, h / height) for h, w in sizes], np.float32)
    return Objects(
        torch.cat([target.labels for target in targets]),
        torch.cat([target.masks for target in targets]),
        tuple(len(target.labels) for target in targets),
        limits,
    )
