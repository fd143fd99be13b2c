"""Samples as flat Arrow columns between processes, and their collation into a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mpformer.data.images import PIXEL_MEAN
from mpformer.data.samples import Sample
from mpformer.types import Batch, InputError, Target

_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("image_id", pa.string()),
        ("image", pa.large_binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("canvas_height", pa.int32()),
        ("canvas_width", pa.int32()),
        ("labels", pa.binary()),
        ("boxes", pa.binary()),
        ("bits", pa.large_binary()),
        ("skipped", pa.string()),
        ("error", pa.string()),
    ]
)


def to_table(samples: Sequence[Sample | tuple[int, InputError]]) -> pa.Table:
    """Flat columns of bytes and numbers. A sample that could not be made is given as (position, error)."""
    rows = [_error_row(*item) if isinstance(item, tuple) else _row(item) for item in samples]
    columns = []
    for field in _SCHEMA:
        values = [row.get(field.name) for row in rows]
        large = field.type == pa.large_binary()
        columns.append(_join(values) if large else pa.array(values, field.type))
    return pa.table(columns, schema=_SCHEMA)


def _row(sample: Sample) -> dict[str, Any]:
    height, width = sample.image.shape[1:]
    return {
        "position": sample.position,
        "image_id": sample.image_id,
        "image": np.ascontiguousarray(sample.image).data,
        "height": height,
        "width": width,
        "canvas_height": sample.canvas[0],
        "canvas_width": sample.canvas[1],
        "labels": sample.labels.astype("<i4").tobytes(),
        "boxes": sample.boxes.astype("<i4").tobytes(),
        "bits": sample.bits,
        "skipped": sample.skipped,
    }


def _error_row(position: int, error: InputError) -> dict[str, Any]:
    return {"position": position, "image": b"", "bits": b"", "error": str(error)}


def _join(values: Sequence[bytes | memoryview]) -> pa.Array:
    """A large_binary array of the values in one copy; `pa.array` would make two."""
    sizes = [memoryview(v).nbytes for v in values]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    content = pa.py_buffer(b"".join(values))
    return pa.Array.from_buffers(pa.large_binary(), len(values), [None, pa.py_buffer(offsets), content])


def from_table(table: pa.Table) -> list[Sample]:
    """The samples of `to_table`, their arrays views into the table. Raises the first error that it holds."""
    columns = {name: table.column(name) for name in _SCHEMA.names}
    samples = []
    for i in range(table.num_rows):
        row = {name: column[i] for name, column in columns.items()}
        if row["error"].is_valid:
            raise InputError(row["error"].as_py())
        height, width = row["height"].as_py(), row["width"].as_py()
        samples.append(
            Sample(
                position=row["position"].as_py(),
                image_id=row["image_id"].as_py(),
                image=np.frombuffer(row["image"].as_buffer(), np.uint8).reshape(3, height, width),
                labels=np.frombuffer(row["labels"].as_py(), "<i4"),
                boxes=np.frombuffer(row["boxes"].as_py(), "<i4").reshape(-1, 4),
                bits=row["bits"].as_py(),
                canvas=(row["canvas_height"].as_py(), row["canvas_width"].as_py()),
                skipped=row["skipped"].as_py(),
            )
        )
    return samples


def collate(samples: Sequence[Sample], canvas: tuple[int, int]) -> Batch:
    """A batch of samples on a canvas (height, width): images padded with `PIXEL_MEAN`, masks bool.

    Empty `samples` make an empty batch.
    """
    height, width = canvas
    images = np.empty((len(samples), 3, height, width), np.uint8)
    for out, sample in zip(images, samples):
        h, w = sample.image.shape[1:]
        out[:, :h, :w] = sample.image
        for plane, mean in zip(out, PIXEL_MEAN):
            plane[h:] = mean
            plane[:h, w:] = mean
    return Batch(
        images=torch.from_numpy(images),
        targets=tuple(_target(s, canvas) for s in samples),
        valid_sizes=tuple((s.image.shape[1], s.image.shape[2]) for s in samples),
        image_ids=tuple(s.image_id for s in samples),
        positions=tuple(s.position for s in samples),
        skipped=tuple(s.skipped for s in samples if s.skipped),
    )


def _target(sample: Sample, canvas: tuple[int, int]) -> Target:
    masks = np.zeros((len(sample.labels), *canvas), bool)
    packed = np.frombuffer(sample.bits, np.uint8)
    offset = 0
    for out, (x, y, width, height) in zip(masks, sample.boxes.tolist()):
        end = offset + -(-width * height // 8)
        pixels = np.unpackbits(packed[offset:end], count=width * height)
        out[y : y + height, x : x + width] = pixels.reshape(height, width).view(bool)
        offset = end
    return Target(torch.from_numpy(sample.labels.astype(np.int64)), torch.from_numpy(masks))
