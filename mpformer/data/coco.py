"""Readers of COCO's two annotation forms: instances (polygons and run lengths) and panoptic (id PNGs).

What stands in another form but means one thing only (a number written as text, a file name with a Windows
separator) is used, and noted. A fault of a single record becomes its `problem`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpformer.config import DataSet, Split
from mpformer.config.yamlfile import nearest, nearest_path
from mpformer.data import fields
from mpformer.data.fields import Integers, Wrong, is_integer
from mpformer.data.findings import Finding, Notes, Weight
from mpformer.data.names import OTHER_NAMES, Files
from mpformer.data.records import Polygons, Record, Segment, share_of
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

NO_IMAGE = "annotations of images that the file does not list"
_LIKE_FRACTIONS = 1.5
"""Polygons none of whose coordinates exceeds it are in units of the image's size: in pixels, all objects
would lie in one corner."""


@dataclass(frozen=True)
class Opened:
    """What a JSON holds."""

    classes: ClassTable
    records: list[Record]
    """In the order of the file."""
    findings: tuple[Finding, ...]


_Found = tuple[tuple[Segment, ...], str, str]
"""Of one image: its segments, the path of its id PNG or "", what is wrong or ""."""


class _File:
    """One annotation file while it is read."""

    def __init__(self, root: Path, dataset: DataSet, place: Split) -> None:
        self.path = root / place.annotations
        self.notes = Notes(self.path)
        self.integers = Integers(self.notes)
        content = read_json(self.path)
        self.annotations: list[dict[str, Any]] = content["annotations"]
        self.images = _images(self.path, content["images"], self.integers)
        panoptic = dataset.format == "coco_panoptic"
        self.classes = _class_table(self.path, content["categories"], dataset.stuff, panoptic, self.integers)
        self.labels = self.classes.labels_by_source_id()
        self.orphans: list[Finding] = []

    @cached_property
    def _other_forms(self) -> dict[str, object]:
        return unique_forms(self.images)

    def image_of(self, annotation: Mapping[str, Any], index: int) -> object:
        """The key of the annotation's image; None, noted, where the file lists no such image."""
        given = annotation.get("image_id")
        if isinstance(given, int | str) and given in self.images:
            return given
        key = self._other_forms.get(str(fields.as_integer(given)))
        if key is None:
            named = annotation.get("id", f"number {index}")
            text = f"{self.path}: annotation {named}: image_id {given!r} is not the id of any image"
            self.orphans.append(Finding(NO_IMAGE, text, Weight.FAULT))
        else:
            self.notes.add(fields.OTHER_FORM, f"'image_id' {given!r} is taken as {key!r}")
        return key

    def located(self, files: Files, item: Mapping[str, Any], what: str) -> tuple[str, bool, str]:
        """(path relative to the root, whether the item's name is another, what is wrong)."""
        try:
            path, other = files.find(item.get("file_name"), f"{self.path}: {what}")
        except InputError as error:
            return "", False, str(error)
        if other:
            self.notes.add(OTHER_NAMES, f"{what}: '{item['file_name']}' is taken to be {path}")
        return path, other, ""

    def opened(self, root: Path, place: Split, found: Mapping[object, _Found]) -> Opened:
        """The records of the split's share of the images, with what was found of each."""
        files = Files(root, place.images)
        records: list[Record] = []
        others: dict[int, str] = {}
        for key, image in self.images.items():
            path, other, problem = self.located(files, image, f"image {key}")
            segments, label_map, other_problem = found[key]
            if other:
                others[len(records)] = path
            records.append(
                Record(
                    image_id=str(key),
                    image=path,
                    width=image["width"],
                    height=image["height"],
                    segments=segments,
                    label_map=label_map or None,
                    problem=problem or other_problem,
                )
            )
        self._refuse_shared_files(records, others)
        findings = (*self.notes.findings(), *self.orphans)
        return Opened(self.classes, _shared(records, place.share, self.path), findings)

    def _refuse_shared_files(self, records: list[Record], others: dict[int, str]) -> None:
        """A problem for each record that uses a file by another name (`others`), if a second one has it."""
        users = defaultdict(list)
        for record in records:
            users[record.image].append(record.image_id)
        for i, path in others.items():
            if len(users[path]) > 1 and not records[i].problem:
                text = f"images {', '.join(users[path])} would all be {path}; name each file as it is"
                records[i] = replace(records[i], problem=f"{self.path}: {text}")


def read_instance(root: Path, dataset: DataSet, place: Split) -> Opened:
    """COCO instance annotations: classes in the order of their ids, records in the order of the file.

    `InputError` is raised for a fault of the whole file.
    """
    file = _File(root, dataset, place)
    segments: dict[object, list[Segment]] = {key: [] for key in file.images}
    problems: dict[object, list[str]] = defaultdict(list)
    seen: set[int] = set()
    for index, annotation in enumerate(file.annotations):
        if (key := file.image_of(annotation, index)) is None:
            continue
        image = file.images[key]
        try:
            size = image["height"], image["width"]
            segment = fields.instance(annotation, size, file.classes, file.labels, file.integers)
            if segment.id in seen:
                raise Wrong("duplicate annotation id; `mpformer data check DATA --fix OUT` numbers them anew")
            seen.add(segment.id)
            if dataset.ignore_iscrowd and segment.crowd:
                segment = replace(segment, crowd=False)
            segments[key].append(segment)
        except Wrong as wrong:
            named = annotation.get("id", f"number {index}")
            problems[key].append(f"{file.path}: annotation {named} (image {key}): {wrong}")
    if (text := _like_fractions(file, segments)) is not None:
        file.orphans.append(Finding("coordinates in units of the image's size", text, Weight.OBSTACLE))
    told = {key: _in_short(of_image) for key, of_image in problems.items()}
    return file.opened(root, place, {k: (tuple(segments[k]), "", told.get(k, "")) for k in segments})


def _in_short(problems: Sequence[str]) -> str:
    more = len(problems) - 1
    return problems[0] + (f" (and {more} more of this image)" if more else "")


def read_panoptic(root: Path, dataset: DataSet, place: Split) -> Opened:
    """COCO panoptic annotations: one PNG of ids per image and the segments that its ids stand for.

    As `read_instance`; the PNGs are decoded later, with the samples.
    """
    if place.panoptic_masks is None:
        raise InputError(
            f"{root / place.annotations}: the data set needs 'panoptic_masks', the folder of the id PNGs, in "
            "its file"
        )
    file = _File(root, dataset, place)
    maps = Files(root, place.panoptic_masks)
    found: dict[object, _Found] = {}
    for index, annotation in enumerate(file.annotations):
        if (key := file.image_of(annotation, index)) is None:
            continue
        if key in found:
            raise InputError(
                f"{file.path}: annotations[{index}]: image {key} has a second annotation, one is expected"
            )
        label_map, _, problem = file.located(maps, annotation, f"annotation of image {key}")
        segments: tuple[Segment, ...] = ()
        try:
            segments = fields.panoptic_segments(annotation, file.classes, file.labels, file.integers)
            if dataset.ignore_iscrowd:
                segments = tuple(replace(s, crowd=False) for s in segments)
        except Wrong as wrong:
            problem = problem or f"{file.path}: annotation of image {key}: {wrong}"
        found[key] = (segments, label_map, problem)
    for key in file.images.keys() - found.keys():
        problem = f"{file.path}: image {key} has no annotation; panoptic data needs one per image"
        found[key] = ((), "", problem)
    return file.opened(root, place, found)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a COCO file, its three lists of objects there. Raises `InputError`."""
    content = parse_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected, not a {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise InputError(
                f"{path}: no '{key}': COCO's 'images', 'annotations' and 'categories' are expected; "
                f"nearest: '{nearest(key, map(str, content))}'"
            )
        if not isinstance(content[key], list) or not all(isinstance(item, dict) for item in content[key]):
            raise InputError(f"{path}: '{key}': a list of objects is expected")
    return content


def parse_json(path: Path) -> Any:
    """Any JSON file's content; `InputError` where it is missing, or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no file {path}{nearest_path(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def _shared(records: list[Record], share: tuple[float, float], path: Path) -> list[Record]:
    """The share's records, in the order of the file."""
    low, high = share
    if (low, high) == (0.0, 1.0):
        return records
    mixed = sorted(records, key=lambda r: (share_of(r.image_id), r.image_id))
    chosen = {r.image_id for r in mixed[int(low * len(records)) : int(high * len(records))]}
    if not chosen:
        raise InputError(f"{path}: none of {len(records)} images lies in the share {low:g}..{high:g}")
    return [r for r in records if r.image_id in chosen]


def _class_table(
    path: Path,
    categories: list[dict[str, Any]],
    stuff: tuple[str, ...] | None,
    panoptic: bool,
    integers: Integers,
) -> ClassTable:
    by_id: dict[int, dict[str, Any]] = {}
    names: dict[str, int] = {}
    for index, category in enumerate(categories):
        what = f"categories[{index}]"
        source_id, name = integers.read(category, "id", "category"), category.get("name")
        if not is_integer(source_id) or not isinstance(name, str) or not name.strip():
            raise InputError(f"{path}: {what}: an integer 'id' and a 'name' are expected")
        if source_id in by_id:
            raise InputError(f"{path}: {what}: duplicate id {source_id}")
        if name.strip() in names:
            raise InputError(
                f"{path}: categories {names[name.strip()]} and {source_id} are both named '{name}': rename "
                "one, or give their annotations one id"
            )
        by_id[source_id], names[name.strip()] = category, source_id
    if not by_id:
        raise InputError(f"{path}: 'categories' is empty: at least one class is expected")
    things = _things(path, by_id, stuff, panoptic, integers)
    return ClassTable(
        tuple(
            ClassInfo(
                name=category["name"],
                source_id=source_id,
                is_thing=things[source_id],
                color=_color(category.get("color")) or distinct_color(label),
            )
            for label, (source_id, category) in enumerate(sorted(by_id.items()))
        )
    )


def _things(
    path: Path,
    by_id: Mapping[int, dict[str, Any]],
    stuff: tuple[str, ...] | None,
    panoptic: bool,
    integers: Integers,
) -> dict[int, bool]:
    """Whether each category is countable: as the data set's `stuff` says, or its 'isthing'."""
    names = {category["name"] for category in by_id.values()}
    if stuff is not None:
        if unknown := [name for name in stuff if name not in names]:
            raise InputError(
                f"{path}: data.dataset.stuff: no category '{unknown[0]}'; "
                f"nearest: {nearest(unknown[0], names)}"
            )
        return {source_id: category["name"] not in stuff for source_id, category in by_id.items()}
    found: dict[int, bool] = {}
    for source_id, category in by_id.items():
        value = integers.read(category, "isthing", "category")
        if value is None and panoptic:
            raise InputError(
                f"{path}: category {source_id} ({category['name']}) has no 'isthing' (1: countable, 0: "
                "stuff such as sky); add it, or name the stuff: data.dataset.stuff=[NAME, ...], [] for none"
            )
        if value not in (None, 0, 1):
            raise InputError(f"{path}: category {source_id}: 'isthing' is {value!r}, 0 or 1 is expected")
        found[source_id] = value != 0
    return found


def _color(value: object) -> tuple[int, int, int] | None:
    """A category's RGB; None where there is none, or something else."""
    if isinstance(value, list) and len(value) == 3 and all(is_integer(c) and 0 <= c <= 255 for c in value):
        return value[0], value[1], value[2]
    return None


def _images(path: Path, listed: list[dict[str, Any]], integers: Integers) -> dict[object, dict[str, Any]]:
    """The images by id, their sizes as integers."""
    if not listed:
        raise InputError(f"{path}: no images: at least one is expected")
    images: dict[object, dict[str, Any]] = {}
    for index, image in enumerate(listed):
        key = image.get("id")
        if isinstance(key, float):
            key = integers.read(image, "id", "image")
        if not (is_integer(key) or isinstance(key, str)):
            raise InputError(f"{path}: images[{index}]: an 'id' is expected")
        if key in images:
            raise InputError(f"{path}: images[{index}]: duplicate id {key}")
        sizes = {}
        for side in ("width", "height"):
            value = integers.read(image, side, "image")
            if not is_integer(value) or not 0 < value < 2**31:
                raise InputError(
                    f"{path}: image {key}: '{side}' is {image.get(side)!r}, a count of pixels is expected; "
                    "`mpformer data check DATA --fix OUT` reads it from the file"
                )
            sizes[side] = value
        images[key] = {**image, **sizes}
    return images


def unique_forms(keys: Iterable[object]) -> dict[str, object]:
    """Ids by the number that they write, where it is one id's alone."""
    forms: dict[str, list[object]] = defaultdict(list)
    for key in keys:
        forms[str(fields.as_integer(key))].append(key)
    return {form: found[0] for form, found in forms.items() if len(found) == 1}


def _like_fractions(file: _File, segments: Mapping[object, list[Segment]]) -> str | None:
    """Why the file's polygons are taken to lie in units of the image's size; None if they do not."""
    highest, first = 0.0, None
    for key, of_image in segments.items():
        image = file.images[key]
        for segment in of_image:
            if not isinstance(segment.mask, Polygons) or max(image["width"], image["height"]) < 8:
                return None
            first = segment.id if first is None else first
            highest = max(highest, max(float(np.max(part)) for part in segment.mask.parts))
            if highest > _LIKE_FRACTIONS:
                return None
    if first is None:
        return None
    return (
        f"{file.path}: annotation {first} and all others: no coordinate exceeds {highest:.3g}, so they are "
        "probably fractions of the image's size; pixels are expected: multiply x by the width, y by the "
        "height"
    )
