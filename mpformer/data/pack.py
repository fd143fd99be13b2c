"""A data set as Parquet shards: encoded images and compact annotations, for disks and object stores alike.

A folder for each split holds its shards and a manifest: the class table, and for every shard its rows, bytes
and SHA-256. The manifest is rewritten after each shard, so an interrupted packing goes on where it was; it
says `complete` when all is there. Rows lie in groups of 16. Those of the training split are shuffled once, so
that a group is a sample of the whole, and an epoch then visits groups at random (`samples.sample_order`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mpformer.config import Data
from mpformer.data import augment
from mpformer.data.catalog import Catalog, Record, Records, Segment, open_split, pack_mask, unpack_mask
from mpformer.data.images import read_bytes
from mpformer.types import ClassTable, InputError

GROUP = 16
"""Rows of a group, the least that is read at a time: some 2 MB of COCO."""
_OPEN_GROUPS = 16
"""Groups that a process keeps in memory."""
_MANIFEST = "manifest.json"
_VERSION = 1

_SEGMENTS = pa.list_(
    pa.struct(
        [
            ("label", pa.int32()),
            ("crowd", pa.bool_()),
            ("area", pa.float64()),
            ("id", pa.int64()),
            ("mask", pa.binary()),
        ]
    )
)
_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.large_binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label_map", pa.large_binary()),
        ("segments", _SEGMENTS),
        ("problem", pa.string()),
    ]
)


def pack(data: Data, out: str, shard_bytes: int = 128 << 20) -> dict[str, int]:
    """Write both splits to a folder, local or `s3://`, `gs://`; the number of images of each.

    The same call again finishes what was interrupted. Under `on_bad_sample: skip` a bad sample keeps its
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
    if getattr(data.dataset, "encoding", "") == "classes" and data.dataset.train.instances is None:
        return data.model_copy(update={"task": "semantic"})
    return data.model_copy(update={"task": "panoptic"})


def _write_split(data: Data, catalog: Catalog, order: Sequence[int], out: str, shard_bytes: int) -> None:
    store = _Store(out)
    manifest = {
        "version": _VERSION,
        "name": catalog.name,
        "source": data.dataset.model_dump(mode="json"),
        "rows": len(order),
        "group": GROUP,
        "objects": _whole(data).task != "semantic",
        **catalog.classes.to_dict(),
        "shards": [],
        "complete": False,
    }
    if (found := store.read_json(_MANIFEST)) is not None:
        for key in ("version", "name", "source", "rows", "group"):
            if found.get(key) != manifest[key]:
                raise InputError(f"{out}/{_MANIFEST}: holds other data ('{key}' differs); name another place")
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
        store.write(_MANIFEST, json.dumps(manifest).encode())
    store.write(_MANIFEST, json.dumps({**manifest, "complete": True}).encode())


def _tables(catalog: Catalog, order: Sequence[int], shard_bytes: int) -> Iterator[pa.Table]:
    """Shards of about that many bytes, each of whole groups but the last."""
    rows: list[dict[str, Any]] = []
    size = 0
    for index in order:
        row = _row(catalog.records[index])
        rows.append(row)
        size += len(row["image"]) + len(row["label_map"] or b"")
        if size >= shard_bytes and len(rows) % GROUP == 0:
            yield pa.Table.from_pylist(rows, schema=_SCHEMA)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=_SCHEMA)


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


# --- reading --------------------------------------------------------------------------------------


def open_packed(root: str, folder: str, task: str) -> tuple[ClassTable, PackedRecords]:
    """A packed split; `InputError` where it is missing, unfinished, cut short or cannot serve the task."""
    place = f"{root.rstrip('/')}/{folder}"
    store = _Store(place)
    manifest = store.read_json(_MANIFEST)
    if manifest is None:
        raise InputError(f"{place}: no {_MANIFEST}: a split that `mpformer data pack` wrote is expected")
    if not manifest["complete"]:
        raise InputError(f"{place}/{_MANIFEST}: packing was interrupted; the same command finishes it")
    if task != "semantic" and not manifest["objects"]:
        raise InputError(f"data.task: '{task}' needs objects, but {place} holds classes only: 'semantic'")
    sizes = store.sizes([shard["name"] for shard in manifest["shards"]])
    for shard in manifest["shards"]:
        size = sizes[shard["name"]]
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise InputError(
                f"{place}/{shard['name']}: the shard {found}, {shard['bytes']} bytes are expected"
            )
    starts = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])]).tolist()
    names = tuple(shard["name"] for shard in manifest["shards"])
    checksums = tuple(shard["sha256"] for shard in manifest["shards"])
    records = PackedRecords(place, names, tuple(starts), manifest["group"], checksums)
    return ClassTable.from_dict(manifest), records


def is_packed(root: str) -> bool:
    """Whether a place, local or an object store, holds what `pack` writes."""
    return _Store(f"{root.rstrip('/')}/train").sizes([_MANIFEST])[_MANIFEST] is not None


def verify(root: str, folder: str) -> list[str]:
    """Shards whose bytes are not those that were written: one line each."""
    store = _Store(f"{root.rstrip('/')}/{folder}")
    manifest = store.read_json(_MANIFEST) or {"shards": []}
    wrong = []
    for shard in manifest["shards"]:
        if hashlib.sha256(store.read(shard["name"])).hexdigest() != shard["sha256"]:
            wrong.append(f"{store.place}/{shard['name']}: its SHA-256 is not that of the manifest")
    return wrong


@dataclass(frozen=True)
class PackedRecords(Records):
    """The records of a packed split; a group of rows is read when one of them is asked for."""

    place: str
    shards: tuple[str, ...]
    starts: tuple[int, ...]
    """First row of each shard, and the number of rows."""
    group: int
    checksums: tuple[str, ...]
    """SHA-256 of each shard, as its manifest has it."""

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Record:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        group, row = divmod(index - self.starts[shard], self.group)
        return _record(_read_group(self.place, self.shards[shard], group), row)

    def fingerprint(self) -> str:
        """Of all bytes of the shards, images included."""
        return hashlib.sha256(" ".join(self.checksums).encode()).hexdigest()


@functools.lru_cache(maxsize=_OPEN_GROUPS)
def _read_group(place: str, shard: str, group: int) -> pa.Table:
    try:
        return _open_shard(place, shard).read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{place}/{shard}: group {group} cannot be read: {error}") from None


@functools.lru_cache(maxsize=64)
def _open_shard(place: str, shard: str) -> pq.ParquetFile:
    store = _Store(place)
    return pq.ParquetFile(store.open(shard), page_checksum_verification=True)


def _record(table: pa.Table, row: int) -> Record:
    value = {name: table.column(name)[row].as_py() for name in table.column_names}
    segments = tuple(
        Segment(s["label"], s["crowd"], unpack_mask(memoryview(s["mask"])), s["area"], s["id"])
        for s in value["segments"]
    )
    return Record(
        value["image_id"],
        value["image"],
        value["width"],
        value["height"],
        segments,
        value["label_map"],
        value["problem"],
    )


class _Store:
    """A folder, on a local disk or in an object store."""

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._files, self._path = (
                pafs.FileSystem.from_uri(place)
                if "://" in place
                else (pafs.LocalFileSystem(), str(Path(place).expanduser().resolve()))
            )
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{place}: not a place that can be opened: {error}") from None

    def open(self, name: str) -> pa.NativeFile:
        """A file for reading at any place; raises OSError."""
        return self._files.open_input_file(f"{self._path}/{name}")

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return file.read()
        except OSError as error:
            raise InputError(f"{self.place}/{name}: cannot be read: {error}") from None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content, None where there is no such file."""
        if self.sizes([name])[name] is None:
            return None
        return json.loads(self.read(name))

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """Bytes of each file, None where there is none."""
        try:
            infos = self._files.get_file_info([f"{self._path}/{name}" for name in names])
        except OSError as error:
            raise InputError(f"{self.place}: cannot be reached: {error}") from None
        return {name: info.size for name, info in zip(names, infos)}

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """The whole file or nothing: an object store shows it when closed, a local disk when moved."""
        local = isinstance(self._files, pafs.LocalFileSystem)
        if local:
            self._files.create_dir(self._path, recursive=True)
        target = f"{self._path}/{name}"
        with self._files.open_output_stream(f"{target}.part" if local else target) as file:
            file.write(content)
        if local:
            self._files.move(f"{target}.part", target)
