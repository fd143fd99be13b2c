"""How fast the data comes, stage by stage and through the loader of the settings, with no model behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpformer.config import Data
from mpformer.data import augment
from mpformer.data.collate import collate
from mpformer.data.images import load_reduced_image
from mpformer.data.packing import from_table, to_table
from mpformer.data.pipeline import train_batches
from mpformer.data.records import Catalog
from mpformer.data.samples import batch_canvas, make_sample, sample_order


@dataclass(frozen=True)
class Stage:
    """One step from the file to the batch on the device, in one process."""

    name: str
    milliseconds: float
    """CPU time per image."""
    megabytes: float
    """What it hands on, per image."""


@dataclass(frozen=True)
class Throughput:
    """What a loader delivers, by the clock on the wall, from its first batch to its last."""

    images_per_second: float
    megabytes_per_second: float
    first_batch_seconds: float


def stages(data: Data, catalog: Catalog, images: int, seed: int = 0) -> list[Stage]:
    """CPU time of every stage over that many training samples, done one stage after the other here.

    The stages are those of `make_sample` and of the loaders; "whole sample" is `make_sample` itself.
    """
    order = sample_order(seed, 0, len(catalog), catalog.group)
    records, read = _timed(lambda: [catalog.records[int(i)] for i in np.resize(order, images)])
    placements = [
        augment.place(r.height, r.width, data.augment, augment.generator(seed, 0, r.image_id))
        for r in records
    ]
    loaded, decode = _timed(
        lambda: [load_reduced_image(r, augment.reduction(p.window)) for r, p in zip(records, placements)]
    )
    placed, resize = _timed(lambda: [augment.place_image(i, p, f) for (i, f), p in zip(loaded, placements)])
    found, masks = _timed(
        lambda: [list(augment.place_masks(r, data.task, p)) for r, p in zip(records, placements)]
    )
    decoded = _megabytes(i for i, _ in loaded)
    drawn = _megabytes(m.pixels for one in found for _, m in one)
    samples, whole = _timed(lambda: [make_sample(catalog, data, seed, p) for p in range(images)])
    table, arrow = _timed(lambda: to_table(samples))
    canvas = batch_canvas(catalog, data, seed, images, 0)
    batch, collated = _timed(lambda: collate(from_table(table), canvas))
    moved, unpacked = _timed(lambda: batch.to("cpu"))
    rows = [
        ("record", read, 0.0),
        ("decode", decode, decoded),
        ("resize and crop", resize, _megabytes(placed)),
        ("masks", masks, drawn),
        ("whole sample", whole, _sample_megabytes(samples)),
        ("to Arrow", arrow, table.nbytes / 1e6),
        ("collate", collated, batch.nbytes / 1e6),
        ("unpack masks", unpacked, moved.nbytes / 1e6),
    ]
    return [Stage(name, 1000 * seconds / images, size / images) for name, seconds, size in rows]


def throughput(data: Data, catalog: Catalog, batch_size: int, steps: int, seed: int = 0) -> Throughput:
    """Batches of one rank through `data.loader`, at least two."""
    began = time.monotonic()
    batches = train_batches(
        data,
        catalog,
        seed=seed,
        batch_size=batch_size,
        steps=range(max(2, steps)),
        rank=0,
        world=1,
    )
    next(batches)
    first = time.monotonic()
    count = size = 0
    for batch in batches:
        count += len(batch)
        size += batch.nbytes
    seconds = time.monotonic() - first
    return Throughput(count / seconds, size / seconds / 1e6, first - began)


def bench_text(found: list[Stage], loader: str, through: Throughput) -> str:
    """Both measurements as a table for a terminal."""
    lines = [f"{'stage':18} {'ms/image':>9} {'images/s':>9} {'MB/image':>9} {'MB/s':>9}"]
    for stage in found:
        rate = 1000 / stage.milliseconds if stage.milliseconds else float("inf")
        lines.append(
            f"{stage.name:18} {stage.milliseconds:9.2f} {rate:9.1f} "
            f"{stage.megabytes:9.2f} {stage.megabytes * rate:9.1f}"
        )
    lines.append(
        f"loader {loader}: {through.images_per_second:.1f} images/s, "
        f"{through.megabytes_per_second:.1f} MB/s, first batch after {through.first_batch_seconds:.1f} s"
    )
    return "\n".join(lines)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def _megabytes(arrays: Any) -> float:
    return sum(a.nbytes for a in arrays) / 1e6


def _sample_megabytes(samples: list[Any]) -> float:
    return sum(s.image.nbytes + len(s.bits) for s in samples) / 1e6
