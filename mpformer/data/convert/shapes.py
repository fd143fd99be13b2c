"""Shapes as tools draw them, as COCO masks: polygons where these hold them, run lengths otherwise.

Coordinates are pixels, x right and y down from the image's upper left corner, and are carried over
unchanged.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mpformer import filekind
from mpformer.data import headers, images, masks
from mpformer.data.convert.found import Notes
from mpformer.data.records import Polygons, Rle
from mpformer.types import InputError

_SAGITTA = 0.05
"""How far, in pixels, the sides of the polygon for a circle or an ellipse may lie inside the curve."""

_DIGITS = 6
"""Decimals of a coordinate that are kept: 0.21 of 50 pixels is 10.5, not 10.499999999999998."""


@dataclass(frozen=True)
class Canvas:
    """The image that shapes are drawn on."""

    height: int
    width: int
    notes: Notes

    def polygon(self, points: object, place: str) -> Polygons | None:
        """A list of (x, y) as a polygon; None, noted, where it has no three different points.

        Raises `InputError` for what is no list of pairs of finite numbers, or lies more than one image size
        outside of the image, as another image's polygon does.
        """
        array = pairs(points, place)
        if len(np.unique(array, axis=0)) < 3:
            self.notes.add("polygons of less than three points left out", place)
            return None
        return Polygons((self._within(array, place),))

    def rectangle(self, corners: Sequence[float], place: str) -> Polygons | None:
        """The rectangle between two corners (x, y, x, y), in whichever order."""
        x0, y0, x1, y1 = numbers(corners, place)
        return self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], place)

    def ellipse(
        self, centre: Sequence[float], radii: Sequence[float], angle: float, place: str
    ) -> Polygons | None:
        """An ellipse turned by `angle` (radians, clockwise on the screen) as a polygon inside it.

        Its sides are nowhere more than 0.05 pixels inside the curve.
        """
        x, y, rx, ry, turn = numbers([*centre, *radii, angle], place)
        if rx < 0 or ry < 0:
            raise InputError(f"{place}: a radius is {min(rx, ry):g}, a positive length is expected")
        largest = max(rx, ry)
        if largest > 4 * max(self.height, self.width):
            raise InputError(f"{place}: a radius of {largest:g} in a {self.width}x{self.height} image")
        if min(rx, ry) == 0:
            self.notes.add("shapes without an area left out", place)
            return None
        sides = 16 if largest < 1 else math.ceil(math.pi / math.acos(1 - _SAGITTA / largest))
        steps = np.arange(max(16, sides)) * (2 * math.pi / max(16, sides))
        along, across = rx * np.cos(steps), ry * np.sin(steps)
        cos, sin = math.cos(turn), math.sin(turn)
        points = np.stack([x + along * cos - across * sin, y + along * sin + across * cos], 1)
        # what lies outside of the image is brought near it, which changes nothing within it
        size = np.array([self.width, self.height])
        return self.polygon(np.clip(points, -0.9 * size, 1.9 * size).tolist(), place)

    def with_holes(self, outer: Polygons, holes: Sequence[Polygons]) -> Polygons | Rle:
        """A polygon less its holes; COCO's polygons have none, so this is run lengths at the image's size."""
        if not holes:
            return outer
        pixels = self.pixels(outer)
        for hole in holes:
            pixels &= ~self.pixels(hole)
        return masks.run_lengths_of(pixels)

    def union(self, parts: Sequence[Polygons | Rle]) -> Polygons | Rle:
        """Several parts of one object."""
        if len(parts) == 1:
            return parts[0]
        polygons = [part for part in parts if isinstance(part, Polygons)]
        if len(polygons) == len(parts):
            return Polygons(tuple(points for polygon in polygons for points in polygon.parts))
        pixels = np.zeros((self.height, self.width), bool)
        for part in parts:
            pixels |= self.pixels(part)
        return masks.run_lengths_of(pixels)

    def bitmap(self, pixels: np.ndarray, x: int, y: int, place: str) -> Rle | None:
        """A mask [h,w] bool whose upper left pixel is (x, y) of the image; None, noted, if it is empty."""
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + pixels.shape[1], self.width), min(y + pixels.shape[0], self.height)
        full = np.zeros((self.height, self.width), bool)
        if left < right and top < bottom:
            full[top:bottom, left:right] = pixels[top - y : bottom - y, left - x : right - x]
        if np.count_nonzero(full) < np.count_nonzero(pixels):
            self.notes.add("masks cut at the image's border", place)
        if not full.any():
            self.notes.add("shapes without an area left out", place)
            return None
        return masks.run_lengths_of(full)

    def pixels(self, mask: Polygons | Rle) -> np.ndarray:
        """The mask [h,w] bool at the image's size, as pycocotools draws it."""
        return masks.mask_pixels(mask, self.height, self.width)

    def _within(self, points: np.ndarray, place: str) -> np.ndarray:
        size = np.array([self.width, self.height])
        far = ((points < -size) | (points > 2 * size)).any(1)
        if far.any():
            x, y = points[far][0].tolist()
            raise InputError(
                f"{place}: point ({x:g}, {y:g}) lies far outside of the {self.width}x{self.height} image"
            )
        if ((points < -1) | (points > size + 1)).any():
            self.notes.add("shapes that reach over the image's border by more than a pixel", place)
        return np.round(points, _DIGITS)


def numbers(values: object, place: str) -> list[float]:
    """Finite numbers; `InputError` for anything else."""
    if not isinstance(values, list | tuple):
        raise InputError(f"{place}: a list of numbers is expected, not {values!r:.60}")
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError(f"{place}: a number is expected, not {value!r:.60}")
        if abs(value) > 1e15 or not math.isfinite(value):
            raise InputError(f"{place}: a finite number is expected, not {value!r:.60}")
    return [float(value) for value in values]


def pairs(points: object, place: str) -> np.ndarray:
    """A list of points (x, y), [n,2] float64; `InputError` for anything else."""
    if not isinstance(points, list | tuple):
        raise InputError(f"{place}: a list of points is expected, not {points!r:.60}")
    rows = [numbers(point, place) for point in points]
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise InputError(f"{place}: a point has {len(wrong)} numbers, 2 are expected")
    if any(not row for row in rows):
        raise InputError(f"{place}: a point has no numbers, 2 are expected")
    return np.array(rows, np.float64).reshape(-1, 2)


def from_base64(text: object, place: str) -> bytes:
    """The bytes that a base64 text stands for. `InputError` where it is none."""
    if not isinstance(text, str):
        raise InputError(f"{place}: base64 text is expected, not {text!r:.60}")
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{place}: not base64: {error}") from None


def mask_png(data: bytes, largest: tuple[int, int], place: str) -> np.ndarray:
    """The object in a PNG of one, [h,w] bool: its alpha where it has that, else all values but 0.

    `largest`: (height, width) that it may have; nothing larger is decoded. Raises `InputError`.
    """
    header = headers.png_header(data)
    if header is None:
        raise InputError(f"{place}: a mask as a PNG is expected, not {filekind.described(data)}")
    width, height = header[:2]
    if not (0 < height <= largest[0] and 0 < width <= largest[1]):
        raise InputError(f"{place}: a mask of {width}x{height} pixels, at most {largest[1]}x{largest[0]} fit")
    if header[3] == headers.PNG_PALETTE:  # a palette: 0 is the background, whatever its colour
        return images.load_index_map(data, place) != 0
    pixels = images.decode(data, place, cv2.IMREAD_UNCHANGED)
    if pixels.ndim == 3:
        pixels = pixels[..., 3] if pixels.shape[2] == 4 else pixels.max(2)
    return np.asarray(pixels != 0)
