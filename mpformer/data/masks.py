"""Masks between their compact forms and pixels, at the image's size or in a crop of it.

The only module of the data part that uses pycocotools, whose rasterisation is used throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mpformer.data.images import load_ids
from mpformer.data.records import MapId, Polygons, Record, Rle, Segment


@dataclass(frozen=True)
class Window:
    """A part of an image and the size that it is resized to: a crop before the resizing."""

    x: int
    y: int
    width: int
    height: int
    """Of the part, in pixels of the image."""
    out_width: int
    out_height: int
    """Of the result."""

    @classmethod
    def whole(cls, width: int, height: int) -> Window:
        """The whole image as it is."""
        return cls(0, 0, width, height, width, height)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from the image to the result."""
        return self.out_width / self.width, self.out_height / self.height


@dataclass(frozen=True)
class BoxMask:
    """The pixels of a mask within its bounding box; everything outside is off."""

    x: int
    y: int
    pixels: np.ndarray
    """[h,w] bool."""


# --- whole masks ----------------------------------------------------------------------------------


def segment_mask(segment: Segment, record: Record) -> np.ndarray:
    """One segment's mask [h,w] bool at the image's size, pixel for pixel what pycocotools makes of it."""
    if isinstance(segment.mask, MapId):
        return load_ids(record) == segment.mask.value
    return mask_pixels(segment.mask, record.height, record.width)


def record_masks(record: Record) -> np.ndarray:
    """All segments' masks [N,h,w] bool at the image's size; the label map is read once."""
    result = np.zeros((len(record.segments), record.height, record.width), bool)
    # a record without a label map has no segment that refers to one
    ids = load_ids(record) if record.label_map is not None else np.empty(0, np.int32)
    for out, segment in zip(result, record.segments):
        if isinstance(segment.mask, MapId):
            np.equal(ids, segment.mask.value, out=out)
        else:
            out[...] = mask_pixels(segment.mask, record.height, record.width)
    return result


def segment_rle(segment: Segment, record: Record) -> dict[str, Any]:
    """One segment's mask as pycocotools' run lengths {"size": [h, w], "counts": bytes}."""
    if isinstance(segment.mask, MapId):
        return coco_mask.encode(np.asfortranarray(segment_mask(segment, record).view(np.uint8)))
    return _encoded(segment.mask, record.height, record.width)


def area(mask: Polygons | Rle, height: int, width: int) -> float:
    """Pixels of a mask at the image's size."""
    return float(coco_mask.area(_encoded(mask, height, width)))


def bounding_box(mask: Polygons | Rle, height: int, width: int) -> list[float]:
    """The smallest box (x, y, width, height) around the pixels of a mask at the image's size."""
    return [float(value) for value in coco_mask.toBbox(_encoded(mask, height, width))]


def mask_pixels(mask: Polygons | Rle, height: int, width: int) -> np.ndarray:
    """A mask [h,w] bool at the image's size, pixel for pixel what pycocotools makes of it."""
    return coco_mask.decode(_encoded(mask, height, width)).view(bool)


def _encoded(mask: Polygons | Rle, height: int, width: int) -> dict[str, Any]:
    if isinstance(mask, Rle):
        return {"size": [height, width], "counts": mask.counts}
    parts = coco_mask.frPyObjects([p.ravel().tolist() for p in mask.parts], height, width)
    return parts[0] if len(parts) == 1 else coco_mask.merge(parts)


# --- masks in a crop ------------------------------------------------------------------------------


def crop_masks(record: Record, segments: tuple[Segment, ...], window: Window) -> Iterator[BoxMask | None]:
    """Each segment's mask in the resized crop; None for one without a pixel there.

    Polygons are moved into the crop and rasterised at its scale, within their bounding box alone: the very
    pixels that pycocotools gives for the moved polygon. Run lengths and label maps are cropped, then resized
    to the nearest pixel.
    """
    cropped_map: np.ndarray | None = None
    for segment in segments:
        mask = segment.mask
        if isinstance(mask, Polygons):
            yield _crop_polygons(mask, window)
        elif isinstance(mask, Rle):
            full = mask_pixels(mask, record.height, record.width).view(np.uint8)
            yield _tight(_crop_nearest(full, window).view(bool))
        else:
            if cropped_map is None:
                cropped_map = _crop_nearest(load_ids(record), window)
            yield _tight(cropped_map == mask.value)


def _crop_polygons(mask: Polygons, window: Window) -> BoxMask | None:
    scale = np.array(window.scale)
    origin = np.array([window.x, window.y], np.float64)
    moved = [(part - origin) * scale for part in mask.parts]
    size = np.array([window.out_width, window.out_height])
    low = np.clip(np.floor(np.min([p.min(0) for p in moved], 0)), 0, size).astype(int)
    high = np.clip(np.ceil(np.max([p.max(0) for p in moved], 0)) + 1, 0, size).astype(int)
    width, height = (high - low).tolist()
    if width <= 0 or height <= 0:
        return None
    # rasterisation commutes with whole-pixel shifts, so the bounding box is enough
    box = Polygons(tuple(p - low for p in moved))
    pixels = np.ascontiguousarray(mask_pixels(box, height, width))
    return BoxMask(int(low[0]), int(low[1]), pixels) if pixels.any() else None


def _crop_nearest(pixels: np.ndarray, window: Window) -> np.ndarray:
    part = pixels[window.y : window.y + window.height, window.x : window.x + window.width]
    if part.shape == (window.out_height, window.out_width):
        return np.ascontiguousarray(part)
    rows = _nearest(window.out_height, window.height)
    columns = _nearest(window.out_width, window.width)
    return part[rows[:, None], columns]


def _nearest(out: int, size: int) -> np.ndarray:
    """Index of the pixel nearest to the centre of each of `out` pixels laid over `size`."""
    return np.minimum(((np.arange(out) + 0.5) * (size / out)).astype(np.intp), size - 1)


def _tight(mask: np.ndarray) -> BoxMask | None:
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return None
    return BoxMask(x, y, mask[y : y + height, x : x + width])


# --- run lengths ----------------------------------------------------------------------------------


def compress_counts(counts: list[int], height: int, width: int) -> Rle:
    """Run lengths (column-major, background first, covering height x width pixels) in compressed form."""
    return Rle(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"])


def decompress_counts(text: bytes) -> list[int]:
    """The run lengths of COCO's compressed string. `ValueError` where the string is damaged.

    pycocotools does not check: a damaged string makes it write outside its buffer.
    """
    counts: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            if position == len(text):
                raise ValueError("the compressed counts end in the middle of a number")
            char = text[position] - 48
            if not 0 <= char < 64:
                raise ValueError(f"the compressed counts hold {text[position : position + 1]!r}")
            value |= (char & 31) << shift
            more = bool(char & 32)
            shift += 5
            position += 1
            if not more and char & 16:
                value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            raise ValueError("the compressed counts hold a negative run")
        counts.append(value)
    return counts


def run_lengths_of(mask: np.ndarray) -> Rle:
    """A mask [h,w] bool in compressed form."""
    return Rle(coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))["counts"])


def run_lengths(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    """A mask [h,w] bool in COCO's JSON form {"size": [h, w], "counts": str or list}."""
    encoded = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    counts = encoded["counts"].decode("ascii") if compressed else decompress_counts(encoded["counts"])
    return {"size": list(mask.shape), "counts": counts}
