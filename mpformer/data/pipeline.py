"""Batches of a run. `data.loader` decides which processes make the samples, never what they are.

Step s of a run with global batch B takes the positions s·B to (s+1)·B - 1 of the sample stream (see
`mpformer.data.samples`), and rank r of `world` workers the r-th slice of them. A batch is therefore a
function of (seed, step, rank, world): resuming, or another number of workers, only changes the positions.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data.collate_fn import ArrowBatchCollateFn

from mpformer.capacity import Capacity
from mpformer.config import Data
from mpformer.data.packing import from_table, to_table
from mpformer.data.records import Catalog
from mpformer.data.samples import Sample, batch_canvas, make_sample
from mpformer.types import InputError, PackedBatch, RunError

_BLOCK_BYTES = 108 << 20
"""Samples of one Ray Data block together, about (seen: 64 MB cost a tenth of the throughput)."""
_AHEAD_BYTES = 512 << 20
"""Samples of a rank that are made or in the making before it takes them, at most, about."""
_EXECUTION_BLOCKS = 4096
"""Blocks of one Ray Data execution, at most: each is an object of the rank's process from the start, and each
execution leaves traces in Ray that stay (seen with Ray 2.60: 0.7 MB)."""
_REST_SECONDS = 0.01
"""Pause between two looks of Ray Data's executor at its tasks."""
_QUIET = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""From which level on Ray Data's loggers print; below it are its plans, its statistics, and that there is no
progress bar."""


def rank_positions(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions of one rank's slice of a step's global batch; it may be empty."""
    start = step * batch_size
    return range(start + batch_size * rank // world, start + batch_size * (rank + 1) // world)


def train_batches(
    data: Data,
    catalog: Catalog | ray.ObjectRef,
    *,
    seed: int,
    batch_size: int,
    steps: range,
    rank: int,
    world: int,
) -> Iterator[PackedBatch]:
    """This rank's slice of the global batch of `batch_size` images, for each of the steps.

    The same batches bit for bit from each `data.loader`. A bad sample raises `InputError` at its step, or is
    replaced (`data.on_bad_sample`). Given as an object reference, the catalog is shared by all workers.
    """
    slices = [rank_positions(step, batch_size, rank, world) for step in steps]
    if data.loader == "ray" and any(slices):
        return _ray(data, catalog, seed, batch_size, slices, world)
    here: Catalog = catalog if isinstance(catalog, Catalog) else ray.get(catalog)
    if data.loader == "torch":
        from mpformer.data.torch_loader import loader_batches

        return loader_batches(data, here, seed, batch_size, slices)
    return _inline(data, here, seed, batch_size, slices)


def _inline(
    data: Data, catalog: Catalog, seed: int, batch_size: int, steps: Sequence[range]
) -> Iterator[PackedBatch]:
    from mpformer.data.collate import collate

    for positions in steps:
        canvas = batch_canvas(catalog, data, seed, batch_size, positions.start)
        yield collate([make_sample(catalog, data, seed, p) for p in positions], canvas)


# --- Ray Data -------------------------------------------------------------------------------------


def _ray(
    data: Data,
    catalog: Catalog | ray.ObjectRef,
    seed: int,
    batch_size: int,
    steps: Sequence[range],
    world: int,
) -> Iterator[PackedBatch]:
    """Batches from a Ray Data execution over this rank's positions, decoded and augmented by tasks anywhere.

    Each rank streams its own rows in their order: `streaming_split` would deal out whole blocks. A long run
    is cut into a few executions, one after the other.
    """
    shared = ray.put(catalog) if isinstance(catalog, Catalog) else catalog
    here = catalog if isinstance(catalog, Catalog) else ray.get(catalog)
    canvas = functools.partial(batch_canvas, here, data, seed, batch_size)
    local = len(steps[0])  # the same for every step
    height, width = canvas(steps[0].start)
    block_rows = min(64, max(4, _BLOCK_BYTES // (3 * height * width)))
    of_execution = max(1, _EXECUTION_BLOCKS * block_rows // local)
    for first in range(0, len(steps), of_execution):
        wanted = steps[first : first + of_execution]
        samples = _dataset(data, shared, seed, np.concatenate(wanted), block_rows, world)
        batches: Iterable[Any] = samples.iter_torch_batches(
            batch_size=local, collate_fn=_Collate(canvas), prefetch_batches=data.prefetch
        )
        for positions, batch in zip(wanted, batches, strict=True):
            if isinstance(batch, InputError):
                raise batch
            if batch.positions != tuple(positions):
                raise RunError(f"Ray Data delivered positions {batch.positions}, expected {tuple(positions)}")
            yield batch


class _Rest(ExecutionCallback):
    """Lets Ray Data's executor pause after each look at its tasks.

    While its consumer is slower than its tasks, it waits for nothing and would spin in the rank's process:
    three quarters of a core, holding the interpreter that the training step needs (seen with Ray 2.60).
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_REST_SECONDS)


def _dataset(
    data: Data,
    catalog: ray.ObjectRef,
    seed: int,
    positions: np.ndarray,
    block_rows: int,
    world: int,
) -> ray.data.Dataset:
    blocks = [
        pa.table({"position": positions[i : i + block_rows]}) for i in range(0, len(positions), block_rows)
    ]
    # not `from_arrow`: it asks a task of one whole CPU for the blocks' sizes, and where two runs share two
    # cores that CPU is never free
    dataset = ray.data.from_blocks(blocks).map_batches(
        _make_block,
        fn_args=(data, catalog, seed),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        **_task_options(world, len(blocks)),
    )
    context = dataset.context  # this data set's own: the process-wide one belongs to other threads, too
    context.execution_options.preserve_order = True
    # one output block per task: a task that waits for its consumer between two blocks would keep its CPU,
    # which another rank may need to fill the batch that both are waiting for
    context.target_max_block_size = 1 << 30
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_AHEAD_BYTES)
    context.custom_execution_callback_classes = [_Rest]
    # a task whose samples wait for their consumer is slow, and no issue
    context.issue_detectors_config.detectors = []
    context.enable_progress_bars = False
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    return dataset


def _task_options(world: int, blocks: int) -> dict[str, Any]:
    """Resources of a data task, and on a small cluster the number of tasks, which their CPUs do not bound."""
    capacity = Capacity.of(ray.nodes())
    cpus = capacity.data_task_cpus(world)
    if cpus == 1:
        return {"num_cpus": cpus}
    # one more than the share of CPUs: a core need not wait for its next block
    tasks = ray.data.TaskPoolStrategy(size=min(blocks, int(capacity.cpus / world) + 1))
    return {"num_cpus": cpus, "compute": tasks}


def _make_block(block: pa.Table, data: Data, catalog: ray.ObjectRef, seed: int) -> pa.Table:
    made = _resolved(catalog)
    rows: list[Sample | tuple[int, InputError]] = []
    for position in block["position"].to_pylist():
        try:
            rows.append(make_sample(made, data, seed, position))
        except InputError as error:  # travels with its row, to be raised at its step
            rows.append((position, error))
    return to_table(rows)


@functools.lru_cache(maxsize=2)
def _resolved(catalog: ray.ObjectRef) -> Catalog:
    """The catalog in this process, its arrays in shared memory."""
    return ray.get(catalog)


class _Collate(ArrowBatchCollateFn):
    def __init__(self, canvas: Callable[[int], tuple[int, int]]) -> None:
        from mpformer.data.collate import collate

        self.canvas = canvas
        self.collate = collate

    def __call__(  # type: ignore[override]  # any object passes through Ray
        self, batch: pa.Table
    ) -> PackedBatch | InputError:
        try:
            samples = from_table(batch)
            return self.collate(samples, self.canvas(samples[0].position))
        except InputError as error:  # prefetching runs ahead: the consumer raises it when its step has come
            return error
