"""What is wrong with a single record, and what is seen of it: image decoded, masks drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from mpformer.data.findings import UNUSABLE, Finding, Weight
from mpformer.data.images import load_ids, load_image, read_bytes, used_bits
from mpformer.data.masks import BoxMask, Window, crop_masks
from mpformer.data.records import MapId, Polygons, Record, Segment
from mpformer.types import InputError

_ROWS = 64
"""Rows of an image that are looked at for its brightness."""

Box = tuple[float, float, float, float]


class _Look(TypedDict):
    brightest: int
    flat: float
    blank: bool


@dataclass(frozen=True)
class Inspected:
    """What was seen of one record."""

    usable: bool
    place: str
    """The image's path, or its id where it has none; "" where no file is found."""
    size: tuple[int, int] = (0, 0)
    """(height, width)."""
    labels: tuple[int, ...] = ()
    """Of the objects that are no crowd and have a pixel."""
    areas: tuple[int, ...] = ()
    """Their pixels."""
    undrawn: int = 0
    """Objects that are no crowd and have no pixel."""
    area_ratios: tuple[float, ...] = ()
    """Pixels drawn to pixels stated, of the objects whose source states an area of its own."""
    boxes: tuple[tuple[Box, Box], ...] = ()
    """(x, y, width, height) as stated and as drawn, of the objects whose source states one."""
    crowds: int = 0
    segments: int = 0
    """All, with and without a pixel."""
    digest: bytes = b""
    """Of the image file."""
    bits: int | None = None
    """In use of a 16-bit file."""
    expected_bits: int = 16
    """As settings or shards have it."""
    brightest: int = 255
    """Value that one pixel of 1,000 exceeds, of the image as the model gets it."""
    flat: float = 0.0
    """Share of the pixels that equal their neighbour: near 1 in label maps, less in photographs."""
    blank: bool = False
    """Whether all pixels are of one colour."""
    unknown: Mapping[int, int] = field(default_factory=dict)
    """Values of its label map that no segment stands for, and their pixels."""
    channels_turned: bool = False
    """Whether its segments' ids are there when the map's channels are read in the order B, G, R."""
    findings: tuple[Finding, ...] = ()


def inspect(record: Record) -> Inspected:
    """Decode a record's image and draw its masks."""
    if record.problem:
        return Inspected(False, _place_of(record), findings=_unusable(record.problem))
    try:
        encoded = read_bytes(record.image)
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        image = load_image(record, encoded)
        bits = used_bits(record, encoded)
        whole = Window.whole(record.width, record.height)
        found = list(crop_masks(record, record.segments, whole))
        unknown, turned = _unknown_values(record)
    except InputError as error:
        return Inspected(False, _place_of(record), findings=_unusable(str(error)))
    kept = [(s, m) for s, m in zip(record.segments, found) if m is not None and not s.crowd]
    return Inspected(
        usable=True,
        place=_place_of(record),
        size=(record.height, record.width),
        labels=tuple(s.label for s, _ in kept),
        areas=tuple(int(m.pixels.sum()) for _, m in kept),
        undrawn=sum(m is None and not s.crowd for s, m in zip(record.segments, found)),
        area_ratios=tuple(int(m.pixels.sum()) / s.area for s, m in kept if _states_area(s)),
        boxes=tuple((s.box, _extent(m)) for s, m in kept if s.box),
        crowds=sum(s.crowd for s in record.segments),
        segments=len(record.segments),
        digest=digest,
        bits=bits,
        expected_bits=record.bits,
        **_look(image),
        unknown=unknown,
        channels_turned=turned,
        findings=(*_mask_findings(record, found), *_id_findings(record, unknown)),
    )


def _extent(mask: BoxMask) -> Box:
    """The smallest box around the mask's pixels, of which it has some."""
    rows, columns = np.flatnonzero(mask.pixels.any(1)), np.flatnonzero(mask.pixels.any(0))
    left, top = mask.x + int(columns[0]), mask.y + int(rows[0])
    return left, top, int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


def _states_area(segment: Segment) -> bool:
    """Whether there is an area, and not that of the box, which some tools write."""
    box = segment.box
    return segment.area >= 1 and (box is None or abs(segment.area - box[2] * box[3]) > 0.01 * segment.area)


def _look(image: np.ndarray) -> _Look:
    rows = image[:: max(1, len(image) // _ROWS)]
    bright = int(np.percentile(rows, 99.9))
    same = (rows[:, 1:] == rows[:, :-1]).all(2)
    blank = bool(same.all()) and bool((image == image[0, 0]).all())
    return {"brightest": bright, "flat": float(same.mean()) if same.size else 1.0, "blank": blank}


def _unusable(reason: str) -> tuple[Finding, ...]:
    return (Finding(UNUSABLE, reason, Weight.FAULT),)


def _place_of(record: Record) -> str:
    return record.image if isinstance(record.image, str) else f"image {record.image_id}"


def _unknown_values(record: Record) -> tuple[dict[int, int], bool]:
    """(pixels of each value of the map that no segment has, whether B and R exchanged give the segments)."""
    if record.label_map is None:
        return {}, False
    ids = load_ids(record)
    values, counts = np.unique(ids, return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist()))
    known = {s.mask.value for s in record.segments if isinstance(s.mask, MapId)}
    unknown = {value: count for value, count in pixels.items() if value not in known}
    if isinstance(record.label_map, np.ndarray):
        return unknown, False
    unknown.pop(0, None)  # void
    turned = known & {(v & 255) << 16 | v & 0xFF00 | v >> 16 for v in pixels}
    return unknown, not known & pixels.keys() and len(turned) > len(known) / 2


def _mask_findings(record: Record, found: Sequence[BoxMask | None]) -> Iterator[Finding]:
    twins: dict[tuple[object, ...], int] = {}
    size = np.array([record.width, record.height])
    for segment, mask in zip(record.segments, found):
        named = f"{_place_of(record)}: object {segment.id}"
        if mask is None:
            yield Finding("objects without a pixel in the image", named)
            continue
        if isinstance(segment.mask, Polygons):
            points = np.concatenate(segment.mask.parts)
            beyond = max((-points).max(), (points - size).max())
            if beyond > 1:
                yield Finding("polygons that reach outside the image", f"{named}: {beyond:.0f} pixels")
        pixels = int(mask.pixels.sum())
        if segment.area >= 1 and abs(segment.area - pixels) > max(30, 0.25 * pixels):
            stated = f"{segment.area:.0f} pixels stated, {pixels} drawn"
            yield Finding("areas that contradict the mask", f"{named}: {stated}")
        digest = hashlib.blake2b(np.packbits(mask.pixels).tobytes(), digest_size=16).digest()
        key = (segment.label, mask.x, mask.y, mask.pixels.shape, digest)
        if key in twins:
            yield Finding("duplicate objects", f"{named}: the same class and mask as {twins[key]}")
        twins.setdefault(key, segment.id)


def _id_findings(record: Record, unknown: Mapping[int, int]) -> Iterator[Finding]:
    if isinstance(record.label_map, np.ndarray):
        return  # a folder of label maps: the values to ignore are in its settings
    source = record.label_map if isinstance(record.label_map, str) else "label map"
    for value in unknown:
        text = f"{source}: id {value} (image {record.image_id})"
        yield Finding("ids that the annotations do not know", text)
