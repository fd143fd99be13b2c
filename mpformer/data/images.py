"""Decoding image files of all kinds to RGB arrays; a damaged file is an error that names it."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mpformer.data.records import Record
from mpformer.types import PIXEL_MEAN, InputError

PAD_COLOR = tuple(round(mean) for mean in PIXEL_MEAN)
"""RGB uint8 of padding: the pixel mean, which the model's normalisation turns into (almost) zero."""

_ORIENTATION = 0x0112
"""EXIF's tag; from 5 on, width and height are swapped."""

_JPEG = b"\xff\xd8\xff"
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_COLOR_2 - cv2.IMREAD_COLOR,
    4: cv2.IMREAD_REDUCED_COLOR_4 - cv2.IMREAD_COLOR,
}
"""cv2's flags for decoding at a fraction of the size."""

cv2.setNumThreads(1)  # samples are spread over processes; threads inside each would only contend


def read_bytes(source: str | bytes) -> bytes:
    """The encoded file. `InputError` where it cannot be read or is empty."""
    if isinstance(source, bytes):
        return source
    try:
        data = Path(source).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    if not data:
        raise InputError(f"{source}: the file is empty, an image is expected")
    return data


def load_image(record: Record) -> np.ndarray:
    """The record's image, [h,w,3] uint8 RGB at the annotated size; see `load_reduced_image`."""
    return load_reduced_image(record, 1)[0]


def load_reduced_image(record: Record, factor: int) -> tuple[np.ndarray, int]:
    """The record's image, [h,w,3] uint8 RGB, and the factor by which it was decoded smaller.

    A JPEG is decoded at 1/`factor` of its size (2 or 4) from its lowest frequencies: faster, and close to
    the mean of its pixels (tested: within 5 of 255 on average). Other files come at full size, factor 1.

    Grey, palette, 16-bit, CMYK and RGBA files (alpha dropped) become 8-bit RGB; of an animation the first
    frame is taken. A rotation noted in EXIF is applied, unless only the image as stored has the annotated
    size. Raises `InputError` for a file that is no image, is truncated or has another size.
    """
    name = record.image if isinstance(record.image, str) else f"image {record.image_id}"
    data = read_bytes(record.image)
    if not data.startswith(_JPEG):
        factor = 1
    flags = cv2.IMREAD_COLOR_RGB | _REDUCED[factor]
    image = decode(data, name, flags)
    expected = (-(-record.height // factor), -(-record.width // factor))
    if image.shape[:2] != expected and image.shape[1::-1] == expected:
        image = decode(data, name, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image.shape[:2] != expected:
        if factor > 1:  # the exact size is only known at full size
            return load_reduced_image(record, 1)
        raise InputError(
            f"{name}: the image is {image.shape[1]}x{image.shape[0]}, "
            f"but its annotations say {record.width}x{record.height} (image {record.image_id})"
        )
    return image, factor


def read_image(source: str | bytes) -> np.ndarray:
    """An image without annotations, [h,w,3] uint8 RGB, EXIF rotation applied. `InputError` if it is none."""
    name = source if isinstance(source, str) else "image"
    return decode(read_bytes(source), name, cv2.IMREAD_COLOR_RGB)


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image file once decoded, from its header. `InputError` if damaged."""
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            width, height = image.size
            # of a PNG, whose EXIF may stand at its end, Pillow would decode the whole
            turned = image.format != "PNG" and image.getexif().get(_ORIENTATION, 1) >= 5
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not an image that can be decoded: {error}") from None
    return (width, height) if turned else (height, width)


def load_ids(record: Record) -> np.ndarray:
    """The record's label map, [h,w] int32: as it is, or of a PNG the ids R + 256 G + 65536 B (0 void)."""
    if isinstance(record.label_map, np.ndarray):
        return record.label_map
    name = record.label_map if isinstance(record.label_map, str) else f"label map of image {record.image_id}"
    if record.label_map is None:
        raise InputError(f"{name}: missing")
    rgb = load_rgb_map(record.label_map, name)
    if rgb.shape[:2] != (record.height, record.width):
        raise InputError(
            f"{name}: the label map is {rgb.shape[1]}x{rgb.shape[0]}, "
            f"but its image is {record.width}x{record.height} (image {record.image_id})"
        )
    red, green, blue = (rgb[..., c].astype(np.int32) for c in range(3))
    return blue << 16 | green << 8 | red


def load_rgb_map(source: str | bytes, name: str) -> np.ndarray:
    """An annotation kept in the three channels of an image, [h,w,3] uint8 RGB."""
    return decode(read_bytes(source), name, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def load_index_map(source: str | bytes, name: str) -> np.ndarray:
    """An annotation of one value per pixel, [h,w] uint8 or uint16: of a palette image the raw indices."""
    data = read_bytes(source)
    if data[:4] == b"\x89PNG" and data[25:26] == b"\x03":  # colour type palette, which cv2 would expand
        decode(data, name, cv2.IMREAD_UNCHANGED)  # finds a damaged file
        return np.array(Image.open(io.BytesIO(data)))
    pixels = decode(data, name, cv2.IMREAD_UNCHANGED)
    if pixels.ndim != 2:
        raise InputError(f"{name}: one value per pixel is expected, not {pixels.shape[2]} channels")
    return pixels


def decode(data: bytes, name: str, flags: int) -> np.ndarray:
    """An encoded image as cv2 decodes it; `InputError`, which begins with `name`, if it is not whole."""
    if _is_cut_short(data):
        raise InputError(f"{name}: the image file is truncated (after {len(data)} bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise InputError(f"{name}: cannot be decoded as an image: {error.err}") from None
    if image is None:
        raise InputError(f"{name}: not an image that can be decoded ({_looks_like(data)})")
    return image


def _is_cut_short(data: bytes) -> bool:
    """Whether the end mark of a JPEG or PNG is missing; cv2 would fill the rest with grey and say nothing."""
    if data.startswith(_JPEG):
        # entropy-coded data never holds FF D9, so an end mark after the last scan's start is the image's own
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND") < 0
    return False


def _looks_like(data: bytes) -> str:
    head = data[:8]
    if head.lstrip().startswith((b"<", b"{")):
        return "it looks like text"
    return f"its first bytes are {head.hex(' ')}"
