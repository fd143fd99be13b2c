"""Readers of images with label maps, or with one mask file per object, instead of a JSON.

Opening such a folder reads names only. The maps are read with their record, on each access; a fault of one of
them is then the record's `problem`.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpformer.config import LabelMaps, LabelSplit, MaskFiles, MaskSplit
from mpformer.config.data import ClassEntry
from mpformer.config.yamlfile import nearest, nearest_path
from mpformer.data import masks
from mpformer.data.findings import Finding, Notes, Weight
from mpformer.data.images import image_size, load_index_map, load_rgb_map
from mpformer.data.mapvalues import listed, unknown_values
from mpformer.data.names import OTHER_NAMES, Files, form, is_litter, walk, without_litter
from mpformer.data.records import MapId, NamedRecords, Record, Records, Segment, share_of
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

_LITTER = "files that a system left, passed over"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Endings of the names of image files, in lower case."""


def read_label_maps(
    root: Path, dataset: LabelMaps, split: str, task: str
) -> tuple[ClassTable, Records, tuple[Finding, ...]]:
    """Images and label maps of one split ("train" or "val"), in the order of their names.

    Raises `InputError` for a missing folder and for a task that the maps cannot serve. An image without a
    label map is a finding, and the problem of its record.
    """
    place = dataset.train if split == "train" else dataset.val
    if task != "semantic" and dataset.encoding == "classes" and place.instances is None:
        raise InputError(
            f"data.task: '{task}' needs separate objects, but the label maps of '{dataset.name}' "
            "hold classes only; expected: semantic"
        )
    notes = Notes(root / place.images)
    images = _with_suffix(root, place.images, dataset.image_suffix, notes)
    names = sorted(images)
    if place.names is not None:
        names = _listed(root / place.names, names, dataset.image_suffix)
    names = _of_share(names, place.share, root / place.images)
    odd = {name: images[name] for name in names if images[name] != name + dataset.image_suffix}
    records = _LabelMapRecords(tuple(names), str(root), dataset, place, odd)
    missing: list[Finding] = []
    for folder in filter(None, (place.labels, place.instances)):
        missing += records.find_maps(folder, notes)
        if place.names is None:
            missing += records.without_image(folder, dataset.val if split == "train" else dataset.train)
    return _class_table(dataset.classes), records, (*notes.findings(), *missing)


def read_mask_files(
    root: Path, dataset: MaskFiles, split: str
) -> tuple[ClassTable, Records, tuple[Finding, ...]]:
    """Images with a file for each object, those of the split's share, in the order of their names."""
    place = dataset.train if split == "train" else dataset.val
    found, litter = without_litter(root.glob(place.images), root)
    paths = sorted(str(p.relative_to(root)) for p in found)
    if not paths:
        raise InputError(f"{root}: no image fits the pattern '{place.images}'")
    low, high = place.share
    chosen = tuple(p for p in paths if low <= share_of(p) < high)
    if not chosen:
        raise InputError(f"{root}: none of {len(paths)} images lies in the share {low:g}..{high:g}")
    findings = (Finding(_LITTER, f"{root}: {place.images}", count=litter),) if litter else ()
    return _class_table(dataset.classes), _MaskFileRecords(chosen, str(root), place), findings


def _class_table(entries: Sequence[ClassEntry]) -> ClassTable:
    return ClassTable(
        tuple(
            ClassInfo(e.name, e.id, e.thing, e.color if e.color is not None else distinct_color(i))
            for i, e in enumerate(entries)
        )
    )


def _with_suffix(root: Path, folder: str, suffix: str, notes: Notes) -> dict[str, str]:
    """Files below a folder that end in a suffix, in either case: {path relative to it, less suffix: path}.

    Other images beside them are noted.
    """
    top = root / folder
    if not top.is_dir():
        raise InputError(f"there is no folder {top}{nearest_path(top, folder=True)}")
    found: dict[str, str] = {}
    others: Counter[str] = Counter()
    for path in sorted(walk(top)):
        if not path.casefold().endswith(suffix.casefold()):
            others[os.path.splitext(path)[1]] += 1
            continue
        name = path[: len(path) - len(suffix)]
        if name in found:
            raise InputError(f"{top}: '{found[name]}' and '{path}' are one image; remove or rename one")
        found[name] = path
    others = Counter({e: n for e, n in others.items() if e.casefold() in IMAGE_ENDINGS})
    shown = ", ".join(f"{count} {ending}" for ending, count in others.most_common())
    if not found:
        raise InputError(f"{top}: no file that ends in '{suffix}'{'; it holds ' + shown if shown else ''}")
    if others:
        notes.add("images with another ending, left out", f"{shown} beside {len(found)} {suffix}")
    return found


def _of_share(names: list[str], share: tuple[float, float], folder: Path) -> list[str]:
    """The names in a share of those in the order of their hashes, in their own order."""
    if share == (0.0, 1.0):
        return names
    low, high = (int(end * len(names)) for end in share)
    chosen = set(sorted(names, key=lambda name: (share_of(name), name))[low:high])
    if not chosen:
        raise InputError(
            f"{folder}: none of {len(names)} images lies in the share {share[0]:g}..{share[1]:g}"
        )
    return [name for name in names if name in chosen]


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


_INSTANCE = 1 << 16
"""Added to the values of separate instance maps, to tell them from classes."""


@dataclass(frozen=True)
class _LabelMapRecords(NamedRecords):
    names: tuple[str, ...]
    root: str
    dataset: LabelMaps
    place: LabelSplit
    odd_images: dict[str, str]
    """Files, relative to the images' folder, of the names whose file ends in the suffix in another case."""
    odd_maps: dict[tuple[str, str], str] = field(default_factory=dict)
    """Files, relative to the root, by folder and name, of the maps whose file is named otherwise."""

    def find_maps(self, folder: str, notes: Notes) -> list[Finding]:
        """Look up the maps of all names in a folder; a finding for each that is missing."""
        suffix = self.dataset.label_suffix
        files = Files(Path(self.root), folder)
        missing = []
        taken: set[str] = set()
        # those that are found come first: what belongs to one image is not proposed for another
        for name in sorted(self.names, key=lambda n: not files.has(n + suffix, elsewhere=False)):
            image = f"{self.root}/{self._image(name)}"
            what = f"{image}: its label map"
            try:
                path, other = files.find(name + suffix, what, elsewhere=False, taken=taken)
            except InputError as error:
                missing.append(Finding("images without a label map", str(error), Weight.FAULT))
                continue
            taken.add(path)
            if other:
                self.odd_maps[folder, name] = path
                notes.add(OTHER_NAMES, f"the label map of {image} is taken to be {path}")
        return missing

    def without_image(self, folder: str, other: LabelSplit) -> list[Finding]:
        """A finding where label maps in a folder belong to no image of this split, nor of the other one."""
        suffix = self.dataset.label_suffix
        used = {self._map(folder, name) for name in self.names}
        used |= {f"{self.root}/{self._image(name)}" for name in self.names}
        left = [
            path
            for path in sorted(walk(Path(self.root, folder)))
            if path.casefold().endswith(suffix.casefold()) and f"{self.root}/{folder}/{path}" not in used
        ]
        shared = {os.path.normpath(place) for place in (other.labels, other.instances) if place is not None}
        if left and os.path.normpath(folder) in shared:
            ending = len(self.dataset.image_suffix)
            theirs = {form(path[:-ending]) for path in walk(Path(self.root, other.images))}
            left = [path for path in left if form(path[: -len(suffix)]) not in theirs]
        if not left:
            return []
        text = (
            f"{self.root}/{folder}/{left[0]}: no image in {self.root}/{self.place.images} has this label map"
        )
        return [Finding("label maps without an image", text, count=len(left))]

    def _image(self, name: str) -> str:
        return f"{self.place.images}/{self.odd_images.get(name, name + self.dataset.image_suffix)}"

    def _map(self, folder: str, name: str) -> str:
        usual = f"{folder}/{name}{self.dataset.label_suffix}"
        return f"{self.root}/{self.odd_maps.get((folder, name), usual)}"

    def read_named(self, name: str) -> Record:
        path = self._map(self.place.labels, name)
        ids = self._ids(path, name)
        labels = {entry.id: label for label, entry in enumerate(self.dataset.classes)}
        segments, unknown = [], []
        values = _values(ids)
        for value, count in values:
            source_id = self._class_of(value)
            if source_id in labels:
                label = labels[source_id]
                thing = self.dataset.classes[label].thing
                if thing and self.place.instances is not None and value < _INSTANCE:
                    continue  # a countable class outside all instances belongs to none
                crowd = thing and self.dataset.encoding == "cityscapes_instances" and value < 1000
                segments.append(Segment(label, crowd, MapId(value), float(count), value))
            elif self.dataset.ignore != "others" and source_id not in self.dataset.ignore:
                unknown.append(value)
        if unknown:
            raise InputError(self._of_unknown(unknown, [value for value, _ in values], path, name))
        height, width = ids.shape
        return Record(name, f"{self.root}/{self._image(name)}", width, height, tuple(segments), ids)

    def _of_unknown(self, unknown: list[int], values: list[int], path: str, name: str) -> str:
        """What to say of the values of a map that are neither classes nor ignored."""
        if self.place.instances is not None and unknown[-1] >= _INSTANCE:
            numbers = sorted({value - _INSTANCE >> 8 for value in unknown if value >= _INSTANCE})
            other = self._map(self.place.instances, name)
            shown = listed(numbers, "number")
            return f"{other}: no class has as its `instance_id` {shown} in the red channel"
        return f"{path}: {unknown_values(unknown, values, self.dataset)}"

    def annotation_files(self, name: str) -> list[str]:
        folders = filter(None, (self.place.labels, self.place.instances))
        return [self._map(folder, name) for folder in folders]

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
            other = self._map(self.place.instances, name)
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
    found = glob.glob(os.path.join(glob.escape(str(image.parent)), pattern))
    return sorted(os.path.normpath(path) for path in found if not is_litter(os.path.basename(path)))
