"""Sizes of images, as labels count them."""

from __future__ import annotations

from pathlib import Path

import cv2

from mpformer.data import images
from mpformer.types import InputError

_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def annotated_size(image: Path, given: tuple[object, object], place: str) -> tuple[int, int]:
    """(height, width) that labels count in: the image's as it is shown, or as it is stored.

    `given`: (height, width) that the label file states, None where it does not. Raises `InputError` where the
    image has neither size.
    """
    size = images.image_size(str(image))
    if given in ((None, None), size):
        return size
    if given == size[::-1]:
        stored = images.decode(images.read_bytes(str(image)), str(image), _AS_STORED).shape[:2]
        if stored == given:
            return size[::-1]
    raise _other_size(given, size, place)


def embedded_size(data: bytes, given: tuple[object, object], place: str) -> tuple[int, int]:
    """As `annotated_size`, for an image within a label file."""
    height, width = images.decode(data, place, cv2.IMREAD_COLOR_RGB).shape[:2]
    if given in ((None, None), (height, width)):
        return height, width
    raise _other_size(given, (height, width), place)


def _other_size(given: tuple[object, object], size: tuple[int, int], place: str) -> InputError:
    stated = f"{given[1]!r:.20}x{given[0]!r:.20}"
    return InputError(f"{place}: its size is given as {stated}, but the image is {size[1]}x{size[0]}")
