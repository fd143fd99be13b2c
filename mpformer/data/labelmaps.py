"""Readers of images with label maps, or with one mask file per object, instead of a JSON.

Opening such a folder reads names only. The maps are read with their record, on each access; a fault of one of
them is then the record's `problem`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpformer.config import LabelMaps, LabelSplit, MaskFiles, MaskSplit
from mpformer.config.data import ClassEntry
from mpformer.config.yamlfile import nearest
from mpformer.data import masks
from mpformer.data.images import image_size, load_index_map, load_rgb_map
from mpformer.data.records import MapId, NamedRecords, Record, Records, Segment
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color


def read_label_maps(
    root: Path, dataset: LabelMaps, split: str, task: str, on_bad_sample: str
) -> tuple[ClassTable, Records]:
    """Images and label maps of one split ("train" or "val"), in the order of their names.

    Raises `InputError` for a missing folder, for a task that the maps cannot serve, and, unless bad samples
    are to be skipped, for an image without a label map.
    """
    place = dataset.train if split == "train" else dataset.val
    if task != "semantic" and dataset.encoding == "classes" and place.instances is None:
        raise InputError(
            f"data.task: '{task}' needs separate objects, but the label maps of '{dataset.name}' "
            "hold classes only; expected: semantic"
        )
    names = _names_with_suffix(root, place.images, dataset.image_suffix)
    if place.names is not None:
        names = _listed(root / place.names, names, dataset.image_suffix)
    for folder in filter(None, (place.labels, place.instances)):
        present = set(_names_with_suffix(root, folder, dataset.label_suffix))
        missing = next((n for n in names if n not in present), None)
        if missing is not None and on_bad_sample == "error":
            raise InputError(
                f"{root / folder / (missing + dataset.label_suffix)}: no such file, the label map of "
                f"{root / place.images / (missing + dataset.image_suffix)}"
            )
    return _class_table(dataset.classes), _LabelMapRecords(tuple(names), str(root), dataset, place)


def read_mask_files(root: Path, dataset: MaskFiles, split: str) -> tuple[ClassTable, Records]:
    """Images with a file for each object, those of the split's share, in the order of their names."""
    place = dataset.train if split == "train" else dataset.val
    paths = sorted(str(p.relative_to(root)) for p in root.glob(place.images))
    if not paths:
        raise InputError(f"{root}: no image fits the pattern '{place.images}'")
    low, high = place.share
    chosen = tuple(p for p in paths if low <= _share_of(p) < high or (high == 1 and _share_of(p) == 1))
    if not chosen:
        raise InputError(f"{root}: none of {len(paths)} images lies in the share {low:g}..{high:g}")
    return _class_table(dataset.classes), _MaskFileRecords(chosen, str(root), place)


def _class_table(entries: Sequence[ClassEntry]) -> ClassTable:
    return ClassTable(
        tuple(
            ClassInfo(e.name, e.id, e.thing, e.color if e.color is not None else distinct_color(i))
            for i, e in enumerate(entries)
        )
    )


def _names_with_suffix(root: Path, folder: str, suffix: str) -> list[str]:
    """Paths below a folder, relative to it, without the suffix that all of them have; sorted."""
    top = root / folder
    if not top.is_dir():
        raise InputError(f"there is no folder {top}")
    found = []
    for path, _, files in os.walk(top, followlinks=True):
        below = os.path.relpath(path, top)
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + f.removesuffix(suffix) for f in files if f.endswith(suffix)]
    if not found:
        raise InputError(f"{top}: no file that ends in '{suffix}'")
    return sorted(found)


def _listed(path: Path, names: Sequence[str], suffix: str) -> list[str]:
    try:
        lines = [line.strip().removesuffix(suffix) for line in path.read_text().splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    known = set(names)
    for number, name in enumerate(lines, 1):
        if name and name not in known:
            close = f"; nearest: {nearest(name, names)}" if len(names) < 5000 else ""
            raise InputError(f"{path}:{number}: there is no image '{name}{suffix}'{close}")
    return [name for name in lines if name]


def _share_of(name: str) -> float:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


_INSTANCE = 1 << 16
"""Added to the values of separate instance maps, to tell them from classes."""


@dataclass(frozen=True)
class _LabelMapRecords(NamedRecords):
    names: tuple[str, ...]
    root: str
    dataset: LabelMaps
    place: LabelSplit

    def read_named(self, name: str) -> Record:
        path = f"{self.root}/{self.place.labels}/{name}{self.dataset.label_suffix}"
        ids = self._ids(path, name)
        labels = {entry.id: label for label, entry in enumerate(self.dataset.classes)}
        segments = []
        for value, count in _values(ids):
            source_id = self._class_of(value)
            if source_id in labels:
                label = labels[source_id]
                thing = self.dataset.classes[label].thing
                if thing and self.place.instances is not None and value < _INSTANCE:
                    continue  # a countable class outside all instances belongs to none
                crowd = thing and self.dataset.encoding == "cityscapes_instances" and value < 1000
                segments.append(Segment(label, crowd, MapId(value), float(count), value))
            elif self.dataset.ignore != "others" and source_id not in self.dataset.ignore:
                raise InputError(f"{path}: the value {value} is neither a class nor among those to ignore")
        height, width = ids.shape
        image = f"{self.root}/{self.place.images}/{name}{self.dataset.image_suffix}"
        return Record(name, image, width, height, tuple(segments), ids)

    def annotation_files(self, name: str) -> list[str]:
        folders = filter(None, (self.place.labels, self.place.instances))
        return [f"{self.root}/{folder}/{name}{self.dataset.label_suffix}" for folder in folders]

    def _ids(self, path: str, name: str) -> np.ndarray:
        """[h,w] int32: one value for each segment."""
        if self.dataset.encoding == "ade_full":
            red, green, blue = (load_rgb_map(path, path)[..., c].astype(np.int32) for c in range(3))
            return (red // 10 << 8 | green) << 8 | blue
        if path.endswith(".mat"):
            from mpformer.data.matfile import load_stuff_map  # scipy, for one data set

            return load_stuff_map(path)
        ids = load_index_map(path, path).astype(np.int32)
        if self.place.instances is not None:
            other = f"{self.root}/{self.place.instances}/{name}{self.dataset.label_suffix}"
            rgb = load_rgb_map(other, other)
            if rgb.shape[:2] != ids.shape:
                raise InputError(f"{other}: the instance map has another size than {path}")
            objects = _INSTANCE + (rgb[..., 0].astype(np.int32) << 8 | rgb[..., 1])
            ids = np.where(rgb[..., 0] > 0, objects, ids)
        return ids

    def _class_of(self, value: int) -> int | None:
        """The class's id at the source."""
        encoding = self.dataset.encoding
        if encoding == "cityscapes_instances":
            return value if value < 1000 else value // 1000
        if encoding in ("mapillary_instances", "ade_full"):
            return value >> 8
        if value < _INSTANCE:
            return value
        number = value - _INSTANCE >> 8
        return next((c.id for c in self.dataset.classes if c.instance_id == number), None)


def _values(ids: np.ndarray) -> list[tuple[int, int]]:
    """(value, number of pixels) of each value in a map; counting is much faster than sorting."""
    counts = np.bincount(ids.ravel())
    found = np.flatnonzero(counts)
    return list(zip(found.tolist(), counts[found].tolist()))


@dataclass(frozen=True)
class _MaskFileRecords(NamedRecords):
    names: tuple[str, ...]
    root: str
    place: MaskSplit

    def read_named(self, name: str) -> Record:
        image = Path(self.root, name)
        height, width = image_size(str(image))
        segments = []
        for number, path in enumerate(_object_files(image, self.place.masks), 1):
            mask = load_index_map(path, path) > 0
            if mask.shape != (height, width):
                raise InputError(
                    f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]}, but its image is {width}x{height}"
                )
            segments.append(Segment(0, False, masks.run_lengths_of(mask), float(mask.sum()), number))
        return Record(name, str(image), width, height, tuple(segments))

    def annotation_files(self, name: str) -> list[str]:
        return _object_files(Path(self.root, name), self.place.masks)


def _object_files(image: Path, pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(str(image.parent)), pattern)))
