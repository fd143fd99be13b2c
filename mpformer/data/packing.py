"""Samples as flat Arrow columns of bytes and numbers: what travels between processes.

Loads no torch: the processes that make samples start twice as fast without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mpformer.data.samples import Sample
from mpformer.types import InputError

_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("image_id", pa.string()),
        ("image", pa.large_binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
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
        values: list[Any] = [row.get(field.name) for row in rows]
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
        "labels": sample.labels.astype("<i4").tobytes(),
        "boxes": sample.boxes.astype("<i4").tobytes(),
        "bits": sample.bits,
        "skipped": sample.skipped,
    }


def _error_row(position: int, error: InputError) -> dict[str, Any]:
    return {"position": position, "image": b"", "bits": b"", "error": str(error)}


def _join(values: Sequence[bytes | memoryview]) -> pa.Array:
    """A large_binary array of the values in one copy; `pa.array` would make two.

    numpy asks for huge pages: Python's own bytes of this size cost four times as much in page faults.
    """
    sizes = [memoryview(v).nbytes for v in values]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    content = np.empty(offsets[-1], np.uint8)
    for value, start, end in zip(values, offsets, offsets[1:]):
        content[start:end] = np.frombuffer(value, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def _split(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The values of a large_binary column, each [bytes] uint8 and a view; a scalar of Arrow's is a copy."""
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = np.frombuffer(content, np.uint8) if content is not None else np.empty(0, np.uint8)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            yield whole[start:end]


def from_table(table: pa.Table) -> list[Sample]:
    """The samples of `to_table`, their arrays views into the table. Raises the first error that it holds."""
    small = table.drop_columns(["image", "bits"]).to_pylist()
    samples = []
    for row, image, bits in zip(small, _split(table["image"]), _split(table["bits"]), strict=True):
        if row["error"] is not None:
            raise InputError(row["error"])
        samples.append(
            Sample(
                position=row["position"],
                image_id=row["image_id"],
                image=image.reshape(3, row["height"], row["width"]),
                labels=np.frombuffer(row["labels"], "<i4"),
                boxes=np.frombuffer(row["boxes"], "<i4").reshape(-1, 4),
                bits=bits.data,
                skipped=row["skipped"],
            )
        )
    return samples
