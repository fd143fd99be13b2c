"""What is wrong with a single record, and what is seen of it: image decoded, masks drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpformer.data.findings import UNUSABLE, Finding, Weight
from mpformer.data.images import load_ids, load_image, read_bytes, used_bits
from mpformer.data.masks import BoxMask, Window, crop_masks
from mpformer.data.records import MapId, Polygons, Record
from mpformer.types import InputError


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
    crowds: int = 0
    segments: int = 0
    """All, with and without a pixel."""
    digest: bytes = b""
    """Of the image file."""
    bits: int | None = None
    """In use of a 16-bit file of which nobody has said how many it uses (`data.bits`, also of shards)."""
    brightest: int = 255
    """Highest value of the image as the model gets it."""
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
        digest = hashlib.blake2b(read_bytes(record.image), digest_size=16).digest()
        image = load_image(record)
        bits = used_bits(record) if record.bits == 16 else None
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
        crowds=sum(s.crowd for s in record.segments),
        segments=len(record.segments),
        digest=digest,
        bits=bits,
        brightest=int(image.max()),
        unknown=unknown,
        channels_turned=turned,
        findings=(*_mask_findings(record, found), *_id_findings(record, unknown)),
    )


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
        if abs(segment.area - pixels) > max(30, 0.25 * pixels):
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
