"""In-memory records of all data sets: images, their segments, and masks in compact form.

A `Catalog` holds a whole split. Its records lie in a few flat arrays (`RecordTable`), so that millions of
segments cost their bytes and little more, and so that Ray's object store shares one copy per node; a `Record`
with its `Segment` objects is made on access.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import struct
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol, overload

import numpy as np

from mpformer.data.findings import Finding
from mpformer.types import ClassTable, InputError, encodable


@dataclass(frozen=True)
class Polygons:
    """A mask as the union of polygons, in pixels: x right, y down from the upper left corner."""

    parts: tuple[np.ndarray, ...]
    """Each [n,2] float64 (x, y), n at least 3."""


@dataclass(frozen=True)
class Rle:
    """A mask as COCO's run lengths (column-major, background first) in their compressed form."""

    counts: bytes


@dataclass(frozen=True)
class MapId:
    """A mask as the pixels of the record's label map that hold this value."""

    value: int


Mask = Polygons | Rle | MapId


@dataclass(frozen=True)
class Segment:
    """One object or stuff region of an image."""

    label: int
    """Contiguous label, an index into the catalog's `ClassTable`."""
    crowd: bool
    """A group of objects annotated as one: no training target, and predictions in it are no errors."""
    mask: Mask
    area: float
    """As the source states it, in pixels; 0 where it does not."""
    id: int
    """The source's own id (COCO: of the annotation; panoptic: of the segment)."""
    box: tuple[float, float, float, float] | None = None
    """(x, y, width, height) in pixels as the source states it, which the mask is checked against."""


@dataclass(frozen=True)
class Record:
    """One image and its annotations."""

    image_id: str
    image: str | bytes
    """Path of the image file, or its encoded bytes; "" where a problem is that there is no such file."""
    width: int
    height: int
    segments: tuple[Segment, ...]
    label_map: str | bytes | np.ndarray | None = None
    """What `MapId` masks refer to: path or encoded bytes of an id PNG (COCO panoptic), or [h,w] int32."""
    problem: str = ""
    """Why the sample cannot be used, in one line that names file and annotation; empty if it can."""
    bits: int = 16
    """Bits in use of a 16-bit image file, 8..16: see `mpformer.config.Data`."""

    def __post_init__(self) -> None:
        # both are written to tables and pages; only paths must keep a name that is not UTF-8
        object.__setattr__(self, "image_id", encodable(self.image_id))
        object.__setattr__(self, "problem", encodable(self.problem))


@dataclass(frozen=True)
class Catalog:
    """One split of a data set."""

    name: str
    """Data set and split, for messages."""
    classes: ClassTable
    records: Records
    root: str
    """Folder of the data set."""
    group: int = 1
    """Neighbouring records that are read together, and stay close to each other in an epoch's order."""
    instances: Records | None = None
    """The things of the same images from annotations of their own; see `mpformer.config.data.Split`."""
    findings: tuple[Finding, ...] = ()
    """What was said on opening it."""

    def __len__(self) -> int:
        return len(self.records)


class Records(Sequence[Record]):
    """Records that are made on access; subclasses define `__len__`, `read` and `fingerprint`."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.read(index % len(self))

    @abstractmethod
    def read(self, index: int) -> Record:
        """The record at an index 0 <= index < len; a fault of it is its `problem`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digits of all that opening the split has read, independent of the folder's path."""

    def image_files(self) -> list[bytes] | None:
        """What identifies the image files, in order; None where it takes reading every record to tell."""
        return None

    def objects_by_label(self) -> np.ndarray | None:
        """Objects that are no crowd of each label in usable records, [at least the labels in use] int64; None
        where it takes reading every record to tell."""
        return None


class NamedRecords(Records):
    """Records identified by file names, each read on access."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def image_files(self) -> list[bytes]:
        return [os.fsencode(name) for name in self.names]

    def read(self, index: int) -> Record:
        name = self.names[index]
        try:
            return self.read_named(name)
        except InputError as error:
            return Record(name, "", 0, 0, (), problem=str(error))

    @abstractmethod
    def read_named(self, name: str) -> Record:
        """The record of that name; raises `InputError` for what is wrong with it."""

    @abstractmethod
    def annotation_files(self, name: str) -> list[str]:
        """Paths of the files that hold the segments of that name."""

    def fingerprint(self) -> str:
        """Of the names and the sizes of their annotation files: reading them all would take too long."""
        digest = hashlib.sha256()
        for name in self.names:
            sizes = [os.path.getsize(p) if os.path.exists(p) else None for p in self.annotation_files(name)]
            digest.update(f"{name} {sizes}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class Reader(Protocol):
    """The contract of `data.dataset.format`: opens one split of a data set."""

    def __call__(self, root: Path, split: str, task: str) -> tuple[ClassTable, Iterable[Record]]:
        """The classes, and the records in a fixed order.

        root: the folder `data.root`. split: "train" or "val". task: "instance", "panoptic" or "semantic"; for
        "instance" stuff may be left in. Records may be listed, their paths relative to `root` and their masks
        `Polygons` or `Rle`, or be `Records` (or `NamedRecords`), which make each one on access.
        A fault of a single record is its `problem`; raises `InputError` for a fault of the whole split, or a
        task that it cannot serve.
        """
        ...


class RecordTable(Records):
    """Records in flat arrays. Pickles without copies (protocol 5)."""

    def __init__(self, columns: dict[str, np.ndarray], root: str) -> None:
        self._columns = columns
        self._root = root

    def __len__(self) -> int:
        return len(self._columns["width"])

    def read(self, index: int) -> Record:
        column = self._columns
        first, last = column["segment_start"][index : index + 2].tolist()
        image, label_map = self._text("image", index), self._text("label_map", index)
        return Record(
            image_id=self._text("image_id", index),
            image=self._path(image) if image else "",
            width=int(column["width"][index]),
            height=int(column["height"][index]),
            segments=tuple(self._segment(i) for i in range(first, last)),
            label_map=self._path(label_map) if label_map else None,
            problem=self._text("problem", index),
        )

    def fingerprint(self) -> str:
        """Of file names, sizes and annotations; not of the images' pixels."""
        digest = hashlib.sha256()
        for name, column in sorted(self._columns.items()):
            if name == "problem":
                continue  # the text names the folder; which records have one is in `problem_start`
            seen = np.diff(column) > 0 if name == "problem_start" else np.ascontiguousarray(column)
            digest.update(f"{name} {len(column)} ".encode())
            digest.update(seen.data)
        return digest.hexdigest()

    def image_files(self) -> list[bytes]:
        blob, starts = self._columns["image"].tobytes(), self._columns["image_start"].tolist()
        return [blob[a:b] for a, b in itertools.pairwise(starts)]

    def objects_by_label(self) -> np.ndarray:
        column = self._columns
        usable = np.repeat(np.diff(column["problem_start"]) == 0, np.diff(column["segment_start"]))
        return np.bincount(column["label"][usable & ~column["crowd"]])

    @property
    def nbytes(self) -> int:
        """Bytes of all columns together."""
        return sum(c.nbytes for c in self._columns.values())

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def _text(self, name: str, index: int) -> str:
        return bytes(self._bytes(name, index)).decode("utf-8", "surrogatepass")

    def _bytes(self, name: str, index: int) -> memoryview:
        start, end = self._columns[f"{name}_start"][index : index + 2].tolist()
        return self._columns[name].data[start:end]

    def _segment(self, index: int) -> Segment:
        column = self._columns
        return Segment(
            label=int(column["label"][index]),
            crowd=bool(column["crowd"][index]),
            mask=unpack_mask(self._bytes("mask", index)),
            area=float(column["area"][index]),
            id=int(column["id"][index]),
            box=None if np.isnan(column["box"][index, 0]) else tuple(column["box"][index].tolist()),
        )


_TEXTS = ("image_id", "image", "label_map", "problem")
_SCALARS = {
    "width": np.int32,
    "height": np.int32,
    "label": np.int32,
    "crowd": np.bool_,
    "area": np.float64,
    "id": np.int64,
}


_NO_BOX = (math.nan,) * 4


def build_table(records: Iterable[Record], root: str) -> RecordTable:
    """Flat columns of records whose paths are relative to `root`."""
    blobs = {name: bytearray() for name in (*_TEXTS, "mask")}
    starts: dict[str, list[int]] = {name: [0] for name in (*_TEXTS, "mask", "segment")}
    scalars: dict[str, list[float]] = {name: [] for name in _SCALARS}
    boxes: list[tuple[float, float, float, float]] = []
    for record in records:
        for name in _TEXTS:
            blobs[name] += str(getattr(record, name) or "").encode("utf-8", "surrogatepass")
            starts[name].append(len(blobs[name]))
        scalars["width"].append(record.width)
        scalars["height"].append(record.height)
        for segment in record.segments:
            for name in ("label", "crowd", "area", "id"):
                scalars[name].append(getattr(segment, name))
            blobs["mask"] += pack_mask(segment.mask)
            starts["mask"].append(len(blobs["mask"]))
            boxes.append(segment.box or _NO_BOX)
        starts["segment"].append(len(scalars["label"]))
    columns: dict[str, np.ndarray] = {n: np.frombuffer(bytes(b), np.uint8) for n, b in blobs.items()}
    columns |= {f"{name}_start": np.asarray(start, np.int64) for name, start in starts.items()}
    columns |= {name: np.asarray(scalars[name], dtype) for name, dtype in _SCALARS.items()}
    columns["box"] = np.asarray(boxes, np.float32).reshape(-1, 4)
    return RecordTable(columns, root)


# One byte of kind, then: P the number of parts and their point counts (int32) and the points (float64);
# R the compressed run lengths; M the value (int64).


def pack_mask(mask: Mask) -> bytes:
    """A mask in flat bytes, as the columns and packed data sets keep it."""
    if isinstance(mask, Polygons):
        head = struct.pack(f"<{len(mask.parts) + 1}i", len(mask.parts), *(len(p) for p in mask.parts))
        return b"P" + head + b"".join(np.ascontiguousarray(p, "<f8").tobytes() for p in mask.parts)
    if isinstance(mask, Rle):
        return b"R" + mask.counts
    return b"M" + struct.pack("<q", mask.value)


def unpack_mask(packed: memoryview) -> Mask:
    """The mask of `pack_mask`."""
    kind, body = packed[0], packed[1:]
    if kind == ord("R"):
        return Rle(bytes(body))
    if kind == ord("M"):
        return MapId(struct.unpack("<q", body)[0])
    (count,) = struct.unpack_from("<i", body)
    lengths = struct.unpack_from(f"<{count}i", body, 4)
    offset, parts = 4 + 4 * count, []
    for length in lengths:
        parts.append(np.frombuffer(body, "<f8", 2 * length, offset).reshape(length, 2))
        offset += 16 * length
    return Polygons(tuple(parts))


def safe_relative_path(name: object, what: str) -> str:
    """A file name from an annotation file that stays in the data folder; `what` begins the error."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{what}: 'file_name' is {name!r}, a path relative to its folder is expected")
    if (plain := relative_path(name)) is None:
        raise InputError(f"{what}: file name '{name}' leaves the data folder; a relative path is expected")
    return plain


def relative_path(name: str) -> str | None:
    """A name as a path that stays in its folder, on any system; None for one that leaves."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    if path.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        return None
    return str(path)


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on an image's name alone, to divide a set into splits."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
