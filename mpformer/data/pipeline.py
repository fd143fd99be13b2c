"""Batches of a run: who makes the samples is a setting, what they are is not.

Step s of a run with global batch B takes the positions s·B to (s+1)·B - 1 of the sample stream (`samples`),
and rank r of `world` workers the r-th slice of them. A batch is therefore known by (seed, step, rank, world)
alone: resuming, or going on with another number of workers, is asking for other positions.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpformer.config import Data
from mpformer.data.catalog import Catalog
from mpformer.data.packing import collate
from mpformer.data.samples import make_sample
from mpformer.types import Batch


def rank_positions(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions of one rank's slice of a step's global batch; it may be empty."""
    start = step * batch_size
    return range(start + batch_size * rank // world, start + batch_size * (rank + 1) // world)


def train_batches(
    data: Data,
    catalog: Catalog,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    stop_step: int,
    rank: int,
    world: int,
) -> Iterator[Batch]:
    """This rank's slice of the global batch of `batch_size` images, for each step from `start_step` on.

    The same batches bit for bit from each `data.loader`. A bad sample raises `InputError` at its step, or is
    replaced (`data.on_bad_sample`).
    """
    loaders = {"inline": _inline}
    steps = (rank_positions(step, batch_size, rank, world) for step in range(start_step, stop_step))
    return loaders[data.loader](data, catalog, seed, steps)


def _inline(data: Data, catalog: Catalog, seed: int, steps: Iterator[range]) -> Iterator[Batch]:
    for positions in steps:
        yield collate([make_sample(catalog, data, seed, p) for p in positions], data.augment.size)
