"""Writing a data set as Parquet shards: encoded images and compact annotations, for disks and object stores.

The manifest is rewritten after each shard, so an interrupted packing can be continued. Rows of the
training split are shuffled once, so that a group is a sample of the whole, and an epoch then visits groups at
random (`samples.sample_order`). `mpformer.data.packed` reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mpformer.config import Data, LabelMaps, PluginDataSet
from mpformer.data import augment
from mpformer.data.catalog import open_split
from mpformer.data.images import read_bytes
from mpformer.data.packed import GROUP, MANIFEST, SCHEMA, VERSION, Store
from mpformer.data.records import Catalog, Record, pack_mask
from mpformer.types import InputError


def pack(data: Data, out: str, shard_bytes: int = 128 << 20) -> dict[str, int]:
    """Write both splits to a folder, local or `s3://`, `gs://`; the number of images of each.

    The same call again continues an interrupted one. Under `on_bad_sample: skip` a bad sample keeps its
    place and its reason. Raises `InputError` for one otherwise, and for a place that holds other data.
    """
    counts = {}
    for split in ("train", "val"):
        catalog = open_split(_whole(data), split)
        order = np.arange(len(catalog))
        if split == "train":
            random = augment.generator(0, 0, data.dataset.name, "pack")
            order = np.argsort(random.random(len(catalog)), kind="stable")
        _write_split(data, catalog, order.tolist(), f"{out.rstrip('/')}/{split}", shard_bytes)
        counts[split] = len(catalog)
    return counts


def _whole(data: Data) -> Data:
    """The same data with all that it holds, whatever the task."""
    dataset = data.dataset
    if isinstance(dataset, PluginDataSet):
        return data  # its reader knows which tasks it serves
    classes_only = (
        isinstance(dataset, LabelMaps) and dataset.encoding == "classes" and dataset.train.instances is None
    )
    return data.model_copy(update={"task": "semantic" if classes_only else "panoptic"})


def _write_split(data: Data, catalog: Catalog, order: Sequence[int], out: str, shard_bytes: int) -> None:
    store = Store(out)
    manifest = {
        "version": VERSION,
        "name": catalog.name,
        "source": data.dataset.model_dump(mode="json"),
        "rows": len(order),
        "group": GROUP,
        "objects": _whole(data).task != "semantic",
        "bits": data.bits,
        **catalog.classes.to_dict(),
        "shards": [],
        "complete": False,
    }
    if (found := store.read_json(MANIFEST)) is not None:
        for key in ("version", "name", "source", "rows", "group", "bits"):
            if found.get(key) != manifest[key]:
                raise InputError(f"{out}/{MANIFEST}: holds other data ('{key}' differs); name another place")
        if found["complete"]:
            return
        manifest["shards"] = found["shards"]
    done = sum(shard["rows"] for shard in manifest["shards"])
    for table in _tables(catalog, order[done:], shard_bytes):
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            row_group_size=GROUP,
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
        )
        content = sink.getvalue()
        name = f"shard-{len(manifest['shards']):05d}.parquet"
        store.write(name, content)
        digest = hashlib.sha256(content).hexdigest()
        manifest["shards"].append(
            {"name": name, "rows": table.num_rows, "bytes": content.size, "sha256": digest}
        )
        store.write(MANIFEST, json.dumps(manifest).encode())
    store.write(MANIFEST, json.dumps({**manifest, "complete": True}).encode())


def _tables(catalog: Catalog, order: Sequence[int], shard_bytes: int) -> Iterator[pa.Table]:
    """Shards of about that many bytes, each of whole groups but the last."""
    rows: list[dict[str, Any]] = []
    size = 0
    for index in order:
        row = _row(catalog.records[index])
        rows.append(row)
        size += len(row["image"]) + len(row["label_map"] or b"")
        if size >= shard_bytes and len(rows) % GROUP == 0:
            yield pa.Table.from_pylist(rows, schema=SCHEMA)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(record: Record) -> dict[str, Any]:
    label_map = record.label_map
    if isinstance(label_map, np.ndarray):
        channels = [label_map >> 16, label_map >> 8 & 255, label_map & 255]
        label_map = cv2.imencode(".png", np.stack(channels, 2).astype(np.uint8))[1].tobytes()
    elif label_map is not None and not record.problem:
        label_map = read_bytes(label_map)
    return {
        "image_id": record.image_id,
        "image": b"" if record.problem else read_bytes(record.image),
        "width": record.width,
        "height": record.height,
        "label_map": None if record.problem else label_map,
        "segments": [
            {"label": s.label, "crowd": s.crowd, "area": s.area, "id": s.id, "mask": pack_mask(s.mask)}
            for s in record.segments
        ],
        "problem": record.problem,
    }
