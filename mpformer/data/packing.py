"""Samples as flat Arrow columns of bytes and numbers: what travels between processes.

Loads no torch: the processes that make samples start twice as fast without it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
                skipped=row["skipped"].as_py(),
            )
        )
    return samples
