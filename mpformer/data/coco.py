"""Readers of COCO's two annotation forms: instances (polygons and run lengths) and panoptic (id PNGs)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from mpformer.config import Split
from mpformer.config.yamlfile import nearest, nearest_path
from mpformer.data import masks
from mpformer.data.records import MapId, Mask, Polygons, Record, Rle, Segment, safe_relative_path
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

_LARGEST_ID = 2**63 - 1


def read_instance(root: Path, split: Split) -> tuple[ClassTable, list[Record]]:
    """COCO instance annotations: classes in the order of their ids, records in the order of the file.

    A fault of a single record becomes its `problem`; `InputError` is raised for a fault of the whole file.
    """
    path = root / split.annotations
    content = _read_json(path)
    classes = _class_table(path, content["categories"])
    labels = classes.labels_by_source_id()
    images = _images(path, content["images"])
    segments: dict[object, list[Segment]] = {key: [] for key in images}
    problems: dict[object, str] = {}
    seen: set[int] = set()
    for index, annotation in enumerate(content["annotations"]):
        key = _image_of(path, images, annotation, f"annotations[{index}]")
        try:
            segment = _instance(annotation, images[key], classes, labels)
            if segment.id in seen:
                raise _Wrong("duplicate annotation id")
            seen.add(segment.id)
            segments[key].append(segment)
        except _Wrong as wrong:
            named = annotation.get("id", f"number {index}")
            problems.setdefault(key, f"{path}: annotation {named} (image {key}): {wrong}")
    records = []
    for key, image in images.items():
        file, problem = _file_name(path, split.images, image, f"image {key}")
        records.append(
            Record(
                image_id=str(key),
                image=file,
                width=image["width"],
                height=image["height"],
                segments=tuple(segments[key]),
                problem=problem or problems.get(key, ""),
            )
        )
    return classes, records


def read_panoptic(root: Path, split: Split) -> tuple[ClassTable, list[Record]]:
    """COCO panoptic annotations: one PNG of ids per image and the segments that its ids stand for.

    As `read_instance`; the PNGs are decoded later, with the samples.
    """
    path = root / split.annotations
    if split.panoptic_masks is None:
        raise InputError(
            f"{path}: the data set needs 'panoptic_masks', the folder of the id PNGs, in its file"
        )
    content = _read_json(path)
    classes = _class_table(path, content["categories"])
    labels = classes.labels_by_source_id()
    images = _images(path, content["images"])
    found: dict[object, tuple[tuple[Segment, ...], str, str]] = {}
    for index, annotation in enumerate(content["annotations"]):
        key = _image_of(path, images, annotation, f"annotations[{index}]")
        if key in found:
            raise InputError(
                f"{path}: annotations[{index}]: image {key} has a second annotation, one is expected"
            )
        label_map, problem = _file_name(path, split.panoptic_masks, annotation, f"annotation of image {key}")
        try:
            segments = _panoptic_segments(annotation, classes, labels)
        except _Wrong as wrong:
            segments, problem = (), problem or f"{path}: annotation of image {key}: {wrong}"
        found[key] = (segments, label_map, problem)
    records = []
    for key, image in images.items():
        file, problem = _file_name(path, split.images, image, f"image {key}")
        if key not in found:
            problem = problem or f"{path}: image {key} has no annotation; panoptic data needs one per image"
        segments, label_map, other_problem = found.get(key, ((), "", ""))
        records.append(
            Record(
                image_id=str(key),
                image=file,
                width=image["width"],
                height=image["height"],
                segments=segments,
                label_map=label_map or None,
                problem=problem or other_problem,
            )
        )
    return classes, records


class _Wrong(Exception):
    """A fault of one annotation; the caller adds the file and the annotation's id."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no file {path}{nearest_path(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
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


def _class_table(path: Path, categories: list[dict[str, Any]]) -> ClassTable:
    by_id: dict[int, dict[str, Any]] = {}
    for index, category in enumerate(categories):
        what = f"{path}: categories[{index}]"
        source_id, name = category.get("id"), category.get("name")
        if not _is_int(source_id) or not isinstance(name, str):
            raise InputError(f"{what}: an integer 'id' and a 'name' are expected")
        if source_id in by_id:
            raise InputError(f"{what}: duplicate id {source_id}")
        by_id[source_id] = category
    if not by_id:
        raise InputError(f"{path}: 'categories' is empty: at least one class is expected")
    infos = []
    for label, (source_id, category) in enumerate(sorted(by_id.items())):
        infos.append(
            ClassInfo(
                name=category["name"],
                source_id=source_id,
                is_thing=bool(category.get("isthing", 1)),
                color=_color(category.get("color")) or distinct_color(label),
            )
        )
    return ClassTable(tuple(infos))


def _color(value: object) -> tuple[int, int, int] | None:
    """A category's RGB; None where there is none, or something else."""
    if isinstance(value, list) and len(value) == 3 and all(_is_int(c) and 0 <= c <= 255 for c in value):
        return value[0], value[1], value[2]
    return None


def _images(path: Path, listed: list[dict[str, Any]]) -> dict[object, dict[str, Any]]:
    if not listed:
        raise InputError(f"{path}: no images: at least one is expected")
    images: dict[object, dict[str, Any]] = {}
    for index, image in enumerate(listed):
        key = image.get("id")
        if not (_is_int(key) or isinstance(key, str)):
            raise InputError(f"{path}: images[{index}]: an 'id' is expected")
        if key in images:
            raise InputError(f"{path}: images[{index}]: duplicate id {key}")
        for side in ("width", "height"):
            if not _is_int(image.get(side)) or not 0 < image[side] < 2**31:
                raise InputError(
                    f"{path}: image {key}: '{side}' is {image.get(side)!r}, a count of pixels is expected"
                )
        images[key] = image
    return images


def _image_of(path: Path, images: dict[object, Any], annotation: dict[str, Any], what: str) -> object:
    key = annotation.get("image_id")
    if not isinstance(key, int | str) or key not in images:
        raise InputError(f"{path}: {what}: image_id {key!r} is not the id of any image")
    return key


def _file_name(path: Path, folder: str, item: dict[str, Any], what: str) -> tuple[str, str]:
    try:
        name = safe_relative_path(item.get("file_name"), f"{path}: {what}")
    except InputError as error:
        return "", str(error)
    return (f"{folder}/{name}" if folder not in ("", ".") else name), ""


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _id(item: dict[str, Any]) -> int:
    value = item.get("id")
    if not _is_int(value) or not -_LARGEST_ID <= value <= _LARGEST_ID:
        raise _Wrong(f"'id' is {value!r}, an integer below 2^63 is expected")
    return value


def _label(item: dict[str, Any], classes: ClassTable, labels: dict[int, int]) -> int:
    source_id = item.get("category_id")
    if _is_int(source_id) and source_id in labels:
        return labels[source_id]
    if not _is_int(source_id):
        raise _Wrong(f"'category_id' is {source_id!r}, an integer is expected")
    close = min(classes.classes, key=lambda c: abs(c.source_id - source_id))
    raise _Wrong(f"unknown category {source_id}; nearest: {close.source_id} ({close.name})")


def _crowd(item: dict[str, Any]) -> bool:
    value = item.get("iscrowd", 0)
    if value not in (0, 1):
        raise _Wrong(f"'iscrowd' is {value!r}, 0 or 1 is expected")
    return bool(value)


def _area(item: dict[str, Any], otherwise: Callable[[], float]) -> float:
    value = item.get("area")
    if value is None:
        return otherwise()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong(f"'area' is {value!r}, a number is expected")
    return float(value)


def _instance(
    annotation: dict[str, Any], image: dict[str, Any], classes: ClassTable, labels: dict[int, int]
) -> Segment:
    height, width = image["height"], image["width"]
    identity = _id(annotation)
    label = _label(annotation, classes, labels)
    given = annotation.get("segmentation")
    mask: Mask
    if isinstance(given, list):
        mask = _polygons(given, height, width)
    elif isinstance(given, dict):
        mask = _run_lengths(given, height, width)
    else:
        raise _Wrong("no 'segmentation': a list of polygons or run lengths are expected")
    area = _area(annotation, lambda: masks.area(mask, height, width))
    return Segment(label, _crowd(annotation), mask, area, identity)


def _polygons(given: list[Any], height: int, width: int) -> Polygons:
    if not given:
        raise _Wrong("'segmentation' is empty: at least one polygon is expected")
    parts = []
    for number, flat in enumerate(given, 1):
        try:
            points = np.asarray(flat, np.float64)
        except (TypeError, ValueError):
            raise _Wrong(f"polygon {number}: a list of numbers x, y, x, y, ... is expected") from None
        if points.ndim != 1 or len(points) % 2:
            raise _Wrong(f"polygon {number}: an even count of numbers x, y, x, y, ... is expected")
        if len(points) < 6:
            raise _Wrong(f"polygon {number} has {len(points) // 2} points, at least 3 are expected")
        if not np.isfinite(points).all():
            raise _Wrong(f"polygon {number} has a coordinate that is no finite number")
        points = points.reshape(-1, 2)
        # up to one image size beyond the border is imprecise annotation; more is another image's polygon, and
        # pycocotools' memory grows with the distance
        size = np.array([width, height])
        if (points < -size).any() or (points > 2 * size).any():
            x, y = points[((points < -size) | (points > 2 * size)).any(1)][0].tolist()
            raise _Wrong(
                f"polygon {number}: point ({x:g}, {y:g}) lies far outside the {width}x{height} image"
            )
        parts.append(points)
    return Polygons(tuple(parts))


def _run_lengths(given: dict[str, Any], height: int, width: int) -> Rle:
    size, counts = given.get("size"), given.get("counts")
    if size != [height, width]:
        raise _Wrong(f"run lengths of size {size}, but the image is {[height, width]} (height, width)")
    if isinstance(counts, str):
        try:
            counts = masks.decompress_counts(counts.encode("ascii"))
        except ValueError as error:
            raise _Wrong(f"run lengths: {error}") from None
    if not isinstance(counts, list) or not all(_is_int(c) and c >= 0 for c in counts):
        raise _Wrong("run lengths: 'counts' is expected to be a string or a list of counts")
    if sum(counts) != height * width:
        raise _Wrong(f"run lengths cover {sum(counts)} pixels, but the image has {height * width}")
    return masks.compress_counts(counts, height, width)


def _panoptic_segments(
    annotation: dict[str, Any], classes: ClassTable, labels: dict[int, int]
) -> tuple[Segment, ...]:
    listed = annotation.get("segments_info")
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise _Wrong("no 'segments_info': a list of segments is expected")
    segments: dict[int, Segment] = {}
    for item in listed:
        identity = _id(item)
        if not 0 < identity < 2**24:
            raise _Wrong(
                f"segment {identity}: an id of 1 to 16777215 is expected (R + 256 G + 65536 B, 0 is void)"
            )
        if identity in segments:
            raise _Wrong(f"duplicate segment id {identity}")
        try:
            label, crowd, area = _label(item, classes, labels), _crowd(item), _area(item, lambda: 0.0)
        except _Wrong as wrong:
            raise _Wrong(f"segment {identity}: {wrong}") from None
        segments[identity] = Segment(label, crowd, MapId(identity), area, identity)
    return tuple(segments.values())
