"""`mpformer predict` as a Ray Data job: the results of one process, by actors anywhere in a cluster."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
import torch

from mpformer.capacity import Capacity
from mpformer.config import Config
from mpformer.cores import usable_cores
from mpformer.evaluate.file_results import FileResult, ImageFile, predict_all
from mpformer.evaluate.prediction import FoundInstance, FoundSegments, Prediction
from mpformer.ops.allocator import keep_freed_memory
from mpformer.types import InputError, RunError

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture

_BLOCK = 16
"""Files of one task, about; fewer where each actor would get only a few tasks."""
_INSTANCE = pa.struct([("label", pa.int32()), ("score", pa.float64()), ("counts", pa.binary())])
_SEGMENTS = pa.struct(
    [("png", pa.binary()), ("labels", pa.list_(pa.int32())), ("scores", pa.list_(pa.float64()))]
)
_ROW = pa.schema(
    [
        ("index", pa.int64()),
        ("size", pa.list_(pa.int32(), 2)),
        ("instances", pa.list_(_INSTANCE)),
        ("panoptic", _SEGMENTS),
        ("semantic", pa.binary()),
        ("overlay", pa.large_binary()),
        ("problem", pa.string()),
        ("refused", pa.string()),
    ]
)
"""A file's result. `size` is null where it cannot be read; `refused`: why the model predicts nothing."""


def predict_on_cluster(
    model: Architecture, files: Sequence[ImageFile], config: Config
) -> Iterator[FileResult]:
    """`file_results.predict_all` by an actor for each of `cluster.workers`.

    With one worker, the default, there are as many as the cluster has GPUs or, without, CPUs.
    The files have to be readable under their absolute paths on all machines. Needs `ray.init`.
    """
    capacity, batch = Capacity.of(ray.nodes()), config.evaluate.batch
    use_gpu = capacity.uses_gpus(config.cluster)
    workers = config.cluster.workers
    if workers == 1:
        workers = max(1, int(capacity.gpus if use_gpu else capacity.cpus))
    workers = min(workers, -(-len(files) // batch))
    # whole batches, those of one process
    rows = batch * max(1, min(_BLOCK, len(files) // (4 * workers)) // batch)
    blocks = [_to_block(range(i, min(i + rows, len(files))), files) for i in range(0, len(files), rows)]
    dataset = ray.data.from_blocks(blocks).map_batches(
        _Predictor,
        fn_constructor_args=(ray.put(copy.deepcopy(model).cpu()), config, workers, use_gpu),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=config.cluster.cpus_per_worker,
        num_gpus=int(use_gpu),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    expected = 0
    for row in _rows(dataset):
        if row["index"] != expected:
            raise RunError(f"Ray Data delivered file {row['index']}, expected {expected}")
        yield _from_row(row, files[expected].name)
        expected += 1
    if expected != len(files):
        raise RunError(f"Ray Data delivered {expected} of {len(files)} files")


def _to_block(indices: range, files: Sequence[ImageFile]) -> pa.Table:
    # names are bytes: not all are UTF-8
    paths = [os.fsencode(Path(files[index].path).absolute()) for index in indices]
    return pa.table({"index": indices, "path": pa.array(paths, pa.binary())})


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in _unwrapped(tables):
        for row in table.to_pylist():
            if row["refused"]:
                raise InputError(row["refused"])
            yield row


def _unwrapped(tables: Iterable[Any]) -> Iterator[Any]:
    """What an actor has raised as one line."""
    try:
        yield from tables
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"predict: {lines[-1].strip()}") from error


class _Predictor:
    """An actor with a copy of the model."""

    def __init__(self, model: ray.ObjectRef, config: Config, workers: int, use_gpu: bool) -> None:
        device = torch.device("cuda" if use_gpu else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(config.cluster.threads or max(1, usable_cores() // workers))
            keep_freed_memory()
        self.model = ray.get(model).to(device)
        self.config = config

    def __call__(self, block: pa.Table) -> pa.Table:
        indices = block["index"].to_pylist()
        files = [ImageFile(os.fsdecode(path), "") for path in block["path"].to_pylist()]
        try:
            results = [*predict_all(self.model, files, self.config)]
        except InputError as error:
            return pa.Table.from_pylist([{"index": i, "refused": str(error)} for i in indices], _ROW)
        return pa.Table.from_pylist([_to_row(*one) for one in zip(indices, results)], _ROW)


def _to_row(index: int, result: FileResult) -> dict[str, Any]:
    found = {} if result.prediction is None else asdict(result.prediction)
    return {**found, "index": index, "overlay": result.overlay, "problem": result.problem}


def _from_row(row: dict[str, Any], name: str) -> FileResult:
    if row["size"] is None:
        return FileResult(problem=row["problem"])
    height, width = row["size"]
    prediction = Prediction(name, (height, width), semantic=row["semantic"])
    if row["instances"] is not None:
        prediction = replace(prediction, instances=tuple(FoundInstance(**one) for one in row["instances"]))
    if (found := row["panoptic"]) is not None:
        segments = FoundSegments(found["png"], tuple(found["labels"]), tuple(found["scores"]))
        prediction = replace(prediction, panoptic=segments)
    return FileResult(prediction, row["overlay"])
