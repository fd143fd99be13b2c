"""Single values of COCO's annotations: what is taken as it is meant, and what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from mpformer.data import masks
from mpformer.data.findings import Notes
from mpformer.data.records import MapId, Mask, Polygons, Rle, Segment
from mpformer.types import ClassTable

LARGEST_ID = 2**63 - 1
_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*")
OTHER_FORM = "numbers that are written as text, or with a decimal point"


class Wrong(Exception):
    """A fault of one annotation; the caller adds the file and the annotation's id."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_integer(value: object) -> object:
    """An integer that is written as text or with a decimal point as an int; anything else as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and (written := _INTEGER.fullmatch(value)):
        return int(written[1])
    return value


def as_number(value: object) -> object:
    """A number, or one that is written as text, as a float; anything else as it is."""
    try:
        return float(value) if isinstance(value, int | float | str) else value
    except (ValueError, OverflowError):
        return value


class Integers:
    """Reads the whole numbers of one file, and notes those that are written in another form."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def read(self, item: Mapping[str, Any], key: str, kind: str, otherwise: object = None) -> object:
        """The value of an item of that kind ("image"): an int where it is one in any form, else as it is."""
        given = item.get(key, otherwise)
        if is_integer(given):
            return given
        value = as_integer(given)
        if value is not given:
            self._notes.add(OTHER_FORM, f"{kind} {item.get('id')}: '{key}' {given!r} is taken as {value}")
        return value


def identity(item: Mapping[str, Any], integers: Integers) -> int:
    """The 'id' of an annotation or segment."""
    value = integers.read(item, "id", "annotation")
    if not is_integer(value) or not -LARGEST_ID <= value <= LARGEST_ID:
        hint = "" if is_integer(value) else "; `mpformer data check DATA --fix OUT` numbers them"
        raise Wrong(f"'id' is {value!r}, an integer below 2^63 is expected{hint}")
    return value


def label(item: Mapping[str, Any], classes: ClassTable, labels: Mapping[int, int], integers: Integers) -> int:
    """The label of an annotation's 'category_id'."""
    source_id = integers.read(item, "category_id", "annotation")
    if is_integer(source_id) and source_id in labels:
        return labels[source_id]
    if not is_integer(source_id):
        named = next((c for c in classes.classes if c.name == source_id), None)
        hint = f"; the id of '{named.name}' is {named.source_id}" if named is not None else ""
        raise Wrong(f"'category_id' is {source_id!r}, an integer is expected{hint}")
    close = min(classes.classes, key=lambda c: abs(c.source_id - source_id))
    raise Wrong(f"unknown category {source_id}; nearest: {close.source_id} ({close.name})")


def crowd(item: Mapping[str, Any], integers: Integers) -> bool:
    """Whether the annotation's 'iscrowd' is 1."""
    value = integers.read(item, "iscrowd", "annotation", otherwise=0)
    if value not in (0, 1):
        raise Wrong(f"'iscrowd' is {value!r}, 0 or 1 is expected")
    return bool(value)


def area(item: Mapping[str, Any], otherwise: Callable[[], float]) -> float:
    """The annotation's 'area' in pixels, computed where it has none, or one of 0."""
    value = item.get("area")
    if value is None:
        return otherwise()
    number = as_number(value)
    if not isinstance(number, float) or not math.isfinite(number):
        raise Wrong(f"'area' is {value!r}, a number is expected")
    return number if number > 0 else otherwise()


def box(item: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """The annotation's 'bbox' as x, y, width, height in pixels; None where it cannot be meant so."""
    value = item.get("bbox")
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(v, int | float) for v in value):
        return None
    x, y, width, height = map(float, value)
    # without an extent, or in units of the image's size
    meant = all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0 and width + height > 2
    return (x, y, width, height) if meant else None


def instance(
    annotation: Mapping[str, Any],
    size: tuple[int, int],
    classes: ClassTable,
    labels: Mapping[int, int],
    integers: Integers,
) -> Segment:
    """The segment of an instance annotation; `size`: (height, width) of its image. Raises `Wrong`."""
    number = identity(annotation, integers)
    of_class = label(annotation, classes, labels, integers)
    given = annotation.get("segmentation")
    mask: Mask
    if given == [] or given == [[]]:
        raise Wrong(f"'segmentation' is empty: at least one polygon is expected{_only_box(annotation)}")
    if isinstance(given, list):
        mask = _polygons(given, *size)
    elif isinstance(given, dict):
        mask = _run_lengths(given, *size)
    else:
        raise Wrong(
            f"no 'segmentation': a list of polygons or run lengths are expected{_only_box(annotation)}"
        )
    pixels = area(annotation, lambda: masks.area(mask, *size))
    return Segment(of_class, crowd(annotation, integers), mask, pixels, number, box(annotation))


def _only_box(annotation: Mapping[str, Any]) -> str:
    return "; there is only a 'bbox', and a box is no mask" if box(annotation) else ""


def is_flat_polygon(given: object) -> bool:
    """Whether a 'segmentation' is one polygon x, y, x, y, ... without the list of polygons around it."""
    return isinstance(given, list) and len(given) >= 6 and all(isinstance(v, int | float) for v in given)


def _polygons(given: list[Any], height: int, width: int) -> Polygons:
    if len(given) == 4 and all(isinstance(v, int | float) for v in given):
        raise Wrong("'segmentation' is a box of four numbers, and a box is no mask: polygons are expected")
    if is_flat_polygon(given):
        raise Wrong(
            "'segmentation' is one flat list; wrap it: [[x, y, ...]], or `mpformer data check DATA --fix OUT`"
        )
    parts = []
    for number, flat in enumerate(given, 1):
        try:
            points = np.asarray(flat, np.float64)
        except (TypeError, ValueError, OverflowError):
            raise Wrong(f"polygon {number}: a list of numbers x, y, x, y, ... is expected") from None
        if points.ndim == 2 and points.shape[1] == 2:
            raise Wrong(f"polygon {number} is a list of pairs; a flat list x, y, x, y, ... is expected")
        if points.ndim != 1 or len(points) % 2:
            raise Wrong(f"polygon {number}: an even count of numbers x, y, x, y, ... is expected")
        if len(points) < 6:
            raise Wrong(f"polygon {number} has {len(points) // 2} points, at least 3 are expected")
        if not np.isfinite(points).all():
            raise Wrong(f"polygon {number} has a coordinate that is no finite number")
        points = points.reshape(-1, 2)
        # up to one image size beyond the border is imprecise annotation; more is another image's polygon, and
        # pycocotools' memory grows with the distance
        size = np.array([width, height])
        if (points < -size).any() or (points > 2 * size).any():
            x, y = points[((points < -size) | (points > 2 * size)).any(1)][0].tolist()
            raise Wrong(f"polygon {number}: point ({x:g}, {y:g}) lies far outside the {width}x{height} image")
        parts.append(points)
    return Polygons(tuple(parts))


def _run_lengths(given: dict[str, Any], height: int, width: int) -> Rle:
    size, counts = given.get("size"), given.get("counts")
    if size != [height, width]:
        turned = "; they are width and height in turn" if size == [width, height] else ""
        raise Wrong(f"run lengths of size {size}, but the image is {[height, width]} (height, width){turned}")
    if isinstance(counts, str):
        try:
            counts = masks.decompress_counts(counts.encode("ascii"))
        except ValueError as error:
            raise Wrong(f"run lengths: {error}") from None
    if not isinstance(counts, list) or not all(is_integer(c) and c >= 0 for c in counts):
        raise Wrong("run lengths: 'counts' is expected to be a string or a list of counts")
    if sum(counts) != height * width:
        raise Wrong(f"run lengths cover {sum(counts)} pixels, but the image has {height * width}")
    return masks.compress_counts(counts, height, width)


def panoptic_segments(
    annotation: Mapping[str, Any], classes: ClassTable, labels: Mapping[int, int], integers: Integers
) -> tuple[Segment, ...]:
    """The segments of a panoptic annotation, whose masks are ids of its PNG. Raises `Wrong`."""
    listed = annotation.get("segments_info")
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise Wrong("no 'segments_info': a list of segments is expected")
    segments: dict[int, Segment] = {}
    for item in listed:
        number = identity(item, integers)
        if not 0 < number < 2**24:
            raise Wrong(
                f"segment {number}: an id of 1 to 16777215 is expected (R + 256 G + 65536 B, 0 is void)"
            )
        if number in segments:
            raise Wrong(f"duplicate segment id {number}")
        try:
            of_class, is_crowd = label(item, classes, labels, integers), crowd(item, integers)
            pixels = area(item, lambda: 0.0)
        except Wrong as wrong:
            raise Wrong(f"segment {number}: {wrong}") from None
        segments[number] = Segment(of_class, is_crowd, MapId(number), pixels, number, box(item))
    return tuple(segments.values())
