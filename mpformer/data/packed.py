"""Reading a packed data set: Parquet shards of encoded images and compact annotations (`mpformer.data.pack`).

A folder for each split holds its shards and a manifest: the class table, and for every shard its rows, bytes
and SHA-256; `complete` marks a finished split. Rows lie in groups of 16.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mpformer.data.records import Record, Records, Segment, unpack_mask
from mpformer.types import ClassTable, InputError

GROUP = 16
"""Rows of a group, the unit of reading: some 2 MB of COCO."""
_OPEN_GROUPS = 16
"""Groups that a process keeps in memory."""
MANIFEST = "manifest.json"
_BITS = (None, *range(8, 17))
"""What `data.bits` may be."""
VERSION = 1

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
SCHEMA = pa.schema(
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


def open_packed(root: str, folder: str, task: str) -> tuple[ClassTable, PackedRecords]:
    """A packed split; `InputError` where it is missing, incomplete, truncated or cannot serve the task."""
    place = f"{root.rstrip('/')}/{folder}"
    store = Store(place)
    manifest = _manifest(store)
    if manifest is None:
        raise InputError(f"{place}: no {MANIFEST}: a split that `mpformer data pack` wrote is expected")
    if not manifest["complete"]:
        raise InputError(f"{place}/{MANIFEST}: packing was interrupted; the same command finishes it")
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
    bits = manifest.get("bits") or 16
    records = PackedRecords(place, names, tuple(starts), manifest["group"], checksums, bits)
    return ClassTable.from_dict(manifest), records


def _manifest(store: Store) -> dict[str, Any] | None:
    """The manifest, its form checked; None where there is none."""
    manifest = store.read_json(MANIFEST)
    if manifest is None:
        return None
    try:
        ClassTable.from_dict(manifest)
        counts = [manifest["group"], *(n for s in manifest["shards"] for n in (s["rows"], s["bytes"]))]
        texts = [t for s in manifest["shards"] for t in (s["name"], s["sha256"])]
        sound = all(isinstance(n, int) and n > 0 for n in counts) and all(isinstance(t, str) for t in texts)
        sound = sound and {"complete", "objects"} <= manifest.keys() and manifest.get("bits") in _BITS
    except (AttributeError, InputError, LookupError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{store.place}/{MANIFEST}: not a manifest that `mpformer data pack` wrote")
    return manifest


def is_packed(root: str) -> bool:
    """Whether a place, local or an object store, holds what `pack` writes."""
    return Store(f"{root.rstrip('/')}/train").sizes([MANIFEST])[MANIFEST] is not None


def verify(root: str, folder: str) -> list[str]:
    """One line for each shard whose checksum is not that of the manifest."""
    store = Store(f"{root.rstrip('/')}/{folder}")
    manifest = _manifest(store) or {"shards": []}
    wrong = []
    for shard in manifest["shards"]:
        if hashlib.sha256(store.read(shard["name"])).hexdigest() != shard["sha256"]:
            wrong.append(f"{store.place}/{shard['name']}: its SHA-256 is not that of the manifest")
    return wrong


@dataclass(frozen=True)
class PackedRecords(Records):
    """The records of a packed split; a group of rows is read on access to one of them."""

    place: str
    shards: tuple[str, ...]
    starts: tuple[int, ...]
    """First row of each shard, and the number of rows."""
    group: int
    checksums: tuple[str, ...]
    """SHA-256 of each shard, as its manifest has it."""
    bits: int = 16
    """Bits in use of 16-bit files: `data.bits` when they were packed."""

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Record:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        group, row = divmod(index - self.starts[shard], self.group)
        table = _read_group(self.place, self.shards[shard], group)
        try:
            return _record(table, row, self.bits)
        except (LookupError, TypeError, ValueError, struct.error, pa.ArrowException) as error:
            where = f"{self.place}/{self.shards[shard]}: row {row} of group {group}"
            raise InputError(f"{where} is not as `mpformer data pack` writes it: {error!r}") from error

    def fingerprint(self) -> str:
        """Of all bytes of the shards, images included."""
        bits = () if self.bits == 16 else (f"{self.bits} bits",)
        return hashlib.sha256(" ".join((*self.checksums, *bits)).encode()).hexdigest()


_READING = threading.Lock()
"""Held while a shard is read: its file may be shared by threads, of which `pyarrow` serves one at a time."""


@functools.lru_cache(maxsize=_OPEN_GROUPS)
def _read_group(place: str, shard: str, group: int) -> pa.Table:
    try:
        with _READING:
            return _open_shard(place, shard).read_row_group(group)
    except (OSError, IndexError, pa.ArrowException) as error:
        raise InputError(f"{place}/{shard}: group {group} cannot be read: {error}") from None


@functools.lru_cache(maxsize=64)
def _open_shard(place: str, shard: str) -> pq.ParquetFile:
    store = Store(place)
    return pq.ParquetFile(store.open(shard), page_checksum_verification=True)


def _record(table: pa.Table, row: int, bits: int) -> Record:
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
        bits,
    )


class Store:
    """A folder, on a local disk or in an object store."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._path: str
        try:
            self._files, self._path = (
                pafs.FileSystem.from_uri(place)
                if "://" in place
                else (pafs.LocalFileSystem(), str(Path(place).resolve()))
            )
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{place}: not a place that can be opened: {error}") from None

    def open(self, name: str) -> pa.NativeFile:
        """A seekable file, opened for reading; raises OSError."""
        return self._files.open_input_file(self._at(name))

    def _at(self, name: str) -> str | bytes:
        """The path of a file; on a local disk as bytes, which need not be UTF-8."""
        path = f"{self._path}/{name}"
        return os.fsencode(path) if isinstance(self._files, pafs.LocalFileSystem) else path

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
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.place}/{name}: not JSON: {error}") from None

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """Bytes of each file, None where there is none."""
        try:
            infos = self._files.get_file_info([self._at(name) for name in names])
        except OSError as error:
            raise InputError(f"{self.place}: cannot be reached: {error}") from None
        return {name: info.size for name, info in zip(names, infos)}

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file atomically: an object store shows it when closed, a local disk when renamed."""
        local = isinstance(self._files, pafs.LocalFileSystem)
        if local:
            self._files.create_dir(self._at("."), recursive=True)
        with self._files.open_output_stream(self._at(f"{name}.part" if local else name)) as file:
            file.write(content)
        if local:
            self._files.move(self._at(f"{name}.part"), self._at(name))
