"""Which prediction is compared with which object: the pairs of all heads and images, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpformer.model.streams import Draws
from mpformer.model.transfer import to_device


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query (or pilot) and an object, head after head, image after image; all [n] int64."""

    heads: Tensor
    images: Tensor
    queries: Tensor
    objects: Tensor
    """Row of `Objects`."""
    rows: Tensor
    """Row of `draws`."""
    counts: tuple[int, ...]
    """Pairs of each head."""
    draws: Draws
    """The random points of the losses."""

    def of_head(self, head: int) -> slice:
        """The pairs of a head."""
        start = sum(self.counts[:head])
        return slice(start, start + self.counts[head])

    def sums(self, values: Tensor) -> Tensor:
        """The sum over the pairs of each head: [n] -> [L]."""
        return torch.stack([of_head.sum() for of_head in values.split(self.counts)])


def tabulate(columns: np.ndarray, heads: int, draws: Draws, device: torch.device) -> Pairs:
    """The pairs of a table of the host [5,n] int64: heads in ascending order, images, queries, objects, rows.

    One copy to the device, for which the host does not wait.
    """
    counts = np.bincount(columns[0], minlength=heads).tolist()
    head, images, queries, objects, rows = to_device(torch.from_numpy(columns), device).unbind(0)
    return Pairs(head, images, queries, objects, rows, tuple(counts), draws)


def at_every_head(columns: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """The same pairs at each of so many heads: columns of [n] -> [1 + columns, heads * n], heads first."""
    count = len(columns[0])
    return np.stack([np.repeat(np.arange(heads), count), *(np.tile(column, heads) for column in columns)])
