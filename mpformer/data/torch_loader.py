"""Batches from the processes of torch's DataLoader, as an alternative to Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Dataset

from mpformer.config import Data
from mpformer.data.collate import collate
from mpformer.data.records import Catalog
from mpformer.data.samples import batch_canvas, make_sample
from mpformer.types import InputError, PackedBatch


def loader_batches(
    data: Data, catalog: Catalog, seed: int, batch_size: int, steps: Sequence[range]
) -> Iterator[PackedBatch]:
    """One batch for each range of positions, in their order; `InputError` at a bad sample's step."""
    loader: DataLoader[PackedBatch | InputError] = DataLoader(
        _Steps(data, catalog, seed, batch_size),
        sampler=steps,
        batch_size=None,  # an item is a whole batch already
        num_workers=data.loader_processes,
        prefetch_factor=max(1, data.prefetch),
        # a forked copy of a process with Ray's threads may hang on one of their locks
        multiprocessing_context="spawn",
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Steps(Dataset[PackedBatch | InputError]):
    """A map-style data set whose items are batches, indexed by their positions."""

    def __init__(self, data: Data, catalog: Catalog, seed: int, batch_size: int) -> None:
        self.data, self.catalog, self.seed, self.batch_size = data, catalog, seed, batch_size

    def __getitem__(self, positions: range) -> PackedBatch | InputError:
        try:
            samples = [make_sample(self.catalog, self.data, self.seed, p) for p in positions]
        except InputError as error:  # raised across processes it would lose its type
            return error
        canvas = batch_canvas(self.catalog, self.data, self.seed, self.batch_size, positions.start)
        return collate(samples, canvas)
