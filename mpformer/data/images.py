"""Decoding image files of all kinds to RGB arrays; a damaged or unusable file is an error that names it.

The only module that uses Pillow (headers, palettes), and the one that stands between the images of users
and cv2: what either raises comes out as `InputError`, what they print is silenced.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from mpformer import filekind
from mpformer.data import headers
from mpformer.data.records import Record
from mpformer.types import PIXEL_MEAN, InputError

PAD_COLOR = tuple(round(mean) for mean in PIXEL_MEAN)
"""RGB uint8 of padding: the pixel mean, which the model's normalisation turns into (almost) zero."""
MAX_PIXELS = 1 << 28
"""Images with more pixels (800 MB as RGB) are refused before they are decoded."""

_ORIENTATION = 0x0112
"""EXIF's tag; from 5 on, width and height are swapped."""
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_COLOR_2 - cv2.IMREAD_COLOR,
    4: cv2.IMREAD_REDUCED_COLOR_4 - cv2.IMREAD_COLOR,
}
"""cv2's flags for decoding at a fraction of the size."""
_MOST_COLORS = 256
"""Colours of a colour-coded label map; no palette has more."""
_RGB_EXPECTED = "1, 3 or 4 channels of 8 or 16 bits are expected"
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}
"""Of TIFF."""
_READERS: dict[bytes, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    filekind.JPEG: JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
}

cv2.setNumThreads(1)  # samples are spread over processes; threads inside each would only contend
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about EXIF that nobody asked for
cv2.utils.logging.setLogLevel(0)  # a damaged file gets one line, ours


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
    except ValueError as error:  # a NUL character in the path
        raise InputError(f"{source!r}: not a path: {error}") from None
    if not data:
        raise InputError(f"{source}: the file is empty, an image is expected")
    return data


def load_image(record: Record, encoded: bytes | None = None) -> np.ndarray:
    """The record's image, [h,w,3] uint8 RGB at the annotated size; see `load_reduced_image`."""
    return load_reduced_image(record, 1, encoded)[0]


def load_reduced_image(record: Record, factor: int, encoded: bytes | None = None) -> tuple[np.ndarray, int]:
    """The record's image, [h,w,3] uint8 RGB, and the factor by which it was decoded smaller.

    `encoded`: what its file holds, where that has been read.

    A JPEG is decoded at 1/`factor` of its size (2 or 4) from its lowest frequencies: faster, and close to
    the mean of its pixels (tested: within 5 of 255 on average). Other files come at full size, factor 1.

    Grey, palette, 16-bit, CMYK and RGBA files (alpha dropped) become 8-bit RGB, 16-bit ones by `record.bits`;
    of an animation the first frame is taken. A rotation noted in EXIF is applied, unless only the image as
    stored has the annotated size. Raises `InputError` for a file that is no image, is truncated, has other
    channels, too many pixels or another size.
    """
    name = _name(record)
    data = encoded or read_bytes(record.image)
    if not data.startswith(filekind.JPEG):
        factor = 1
    image = _decode_rgb(data, name, record.bits, _REDUCED[factor])
    expected = (-(-record.height // factor), -(-record.width // factor))
    if image.shape[:2] != expected and image.shape[1::-1] == expected:
        image = _decode_rgb(data, name, record.bits, _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    if image.shape[:2] != expected:
        if factor > 1:  # the exact size is only known at full size
            return load_reduced_image(record, 1, data)
        raise InputError(
            f"{name}: the image is {image.shape[1]}x{image.shape[0]}, "
            f"but its annotations say {record.width}x{record.height} (image {record.image_id})"
        )
    return image, factor


def read_image(source: str | bytes, bits: int = 16) -> np.ndarray:
    """An image without annotations, [h,w,3] uint8 RGB, EXIF rotation applied. `InputError` if it is none.

    `bits`: those in use of a 16-bit file.
    """
    name = source if isinstance(source, str) else "image"
    return _decode_rgb(read_bytes(source), name, bits)


def pillow_image(image: object, bits: int = 16) -> np.ndarray | None:
    """A PIL image as [h,w,3] uint8 RGB, as `read_image` gives its file; None for another object.

    `bits`: those in use of a 16-bit one. `InputError` for one that is damaged, empty or of floats.
    """
    if not isinstance(image, Image.Image):
        return None
    try:
        image = ImageOps.exif_transpose(image)
        if 0 in image.size or image.mode == "F":
            raise InputError(f"image: {image.size} pixels of the mode {image.mode}: no picture")
        if image.mode.startswith("I"):  # 16 bits, which PIL itself would cut off
            grey = np.minimum(np.asarray(image).clip(0) >> (bits - 8), 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))
    except OSError as error:  # it is decoded now
        raise InputError(f"image: cannot be decoded: {error}") from None


def used_bits(record: Record, encoded: bytes) -> int | None:
    """Bits in use of the record's image, 8..16, by its largest value; None unless it is a 16-bit file."""
    header = headers.png_header(encoded)
    if encoded.startswith(filekind.JPEG) or (header is not None and header[2] < 16):
        return None
    pixels = decode(encoded, _name(record), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return max(8, int(pixels.max()).bit_length()) if pixels.dtype == np.uint16 else None


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image file once decoded, from its header. `InputError` if damaged."""
    data = read_bytes(path)
    if (header := headers.png_header(data)) is not None:
        return header[1], header[0]  # its EXIF may stand at its end: Pillow would decode the whole to find it
    width, height, turned = _header_size(data, path)
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
    """An annotation kept in the three channels of an image, [h,w,3] uint8 RGB; of RGBA the alpha is dropped.

    `InputError` for an image that has other channels, whose values would be read as other ids: grey or 16
    bits (but for a grey one that is 0 throughout), and for a JPEG.
    """
    data = read_bytes(source)
    _refuse_jpeg(data, name)
    pixels = decode(data, name, cv2.IMREAD_UNCHANGED)
    header = headers.png_header(data)
    grey = pixels.ndim == 2 or (header is not None and header[3] == headers.PNG_GREY_ALPHA)
    if pixels.dtype == np.uint8 and not grey:
        return np.ascontiguousarray(pixels[..., 2::-1])
    if pixels.dtype.kind in "iu" and not pixels.any():
        return np.zeros((*pixels.shape[:2], 3), np.uint8)
    found = f"{'grey' if grey else 'colour'}, {8 * pixels.dtype.itemsize}-bit"
    raise InputError(
        f"{name}: the id map is {found}; 3 channels of 8 bits are expected, the id being "
        "R + 256 G + 65536 B: write the ids of a single channel as R = id % 256, G = id // 256 % 256, "
        "B = id // 65536"
    )


def load_index_map(source: str | bytes, name: str) -> np.ndarray:
    """An annotation of one value per pixel, [h,w] uint8 or uint16: of a palette image the raw indices.

    Grey PNGs of 1, 2 or 4 bits hold 0..1, 0..3 or 0..15. Colour channels that are equal throughout, without
    transparency, are a grey map. `InputError` for channels that differ, for values that are not whole or not
    in 0..65535, and for a JPEG.
    """
    data = read_bytes(source)
    _refuse_jpeg(data, name)
    pixels = decode(data, name, cv2.IMREAD_UNCHANGED)  # finds a damaged file, too
    header = headers.png_header(data)
    if header is not None and header[3] == headers.PNG_PALETTE:  # cv2 expands the palette
        return _palette_indices(data, name)
    if pixels.ndim != 2:
        pixels = _grey_of_channels(pixels, data, name)
    if header is not None and header[2] < 8:  # cv2 spreads the values over 0..255
        pixels = pixels // (255 // ((1 << header[2]) - 1))
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(
            f"{name}: {pixels.dtype} values from {pixels.min()} to {pixels.max()}; "
            "whole numbers in 0..65535 are expected: save it with 8 or 16 bits"
        )
    return pixels.astype(np.uint16)


def decode(data: bytes, name: str, flags: int) -> np.ndarray:
    """An encoded image as cv2 decodes it; `InputError`, which begins with `name`, if it is not whole."""
    if not data:
        raise InputError(f"{name}: the file is empty, an image is expected")
    if headers.is_cut_short(data):
        raise InputError(f"{name}: the image file is truncated (after {len(data)} bytes)")
    _refuse_before_decoding(data, name)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError) as error:
        reason = error.err if isinstance(error, cv2.error) else "not enough memory"
        raise InputError(f"{name}: cannot be decoded as an image: {reason}") from None
    if image is None:
        kind = _tiff_header(data, name) if data.startswith(filekind.TIFF) else filekind.described(data)
        raise InputError(f"{name}: not an image that can be decoded ({kind})")
    return image


# --- parts ----------------------------------------------------------------------------------------


def _name(record: Record) -> str:
    return record.image if isinstance(record.image, str) else f"image {record.image_id}"


def _decode_rgb(data: bytes, name: str, bits: int, flags: int = 0) -> np.ndarray:
    """[h,w,3] uint8 RGB of an encoded image; of a 16-bit one the upper 8 of the `bits` in use."""
    header = headers.png_header(data)
    if data.startswith(filekind.JPEG) or (header is not None and header[2] <= 8):
        return decode(data, name, flags | cv2.IMREAD_COLOR_RGB)
    # cv2 5.0 swaps the channels of a 16-bit TIFF wrongly if it is to give RGB
    if data.startswith(filekind.TIFF) and not (tiff := _tiff_header(data, name)).is_picture():
        raise InputError(f"{name}: {tiff}; {_RGB_EXPECTED}")
    image = decode(data, name, flags | cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image.dtype == np.uint16:
        image = np.minimum(image >> (bits - 8), 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise InputError(f"{name}: the values are {image.dtype}; {_RGB_EXPECTED}")
    return np.ascontiguousarray(image[..., ::-1])


def _refuse_jpeg(data: bytes, name: str) -> None:
    if data.startswith(filekind.JPEG):
        raise InputError(f"{name}: a JPEG does not keep the values of its pixels; a PNG is expected")


def _refuse_before_decoding(data: bytes, name: str) -> None:
    """Raise `InputError` for a PNG with wrong checksums, and for what would take too much memory."""
    header = headers.png_header(data)
    if header is not None and (damaged := _damaged_chunk(data)):
        raise InputError(f"{name}: the image file is damaged ({damaged})")
    if header is not None:
        size: tuple[int, ...] | None = header[:2]
    elif data.startswith(filekind.JPEG):
        size = headers.jpeg_size(data)
    elif data.startswith((*_READERS, *filekind.TIFF)) or headers.webp_header(data) is not None:
        size = _header_size(data, name)[:2]
    else:
        size = None  # rare formats, for which cv2's own limit holds: four times as many
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{name}: {size[0]}x{size[1]} pixels; at most {MAX_PIXELS // 10**6} million are read: "
            "cut it into tiles"
        )


def _damaged_chunk(data: bytes) -> str:
    """Which chunk of a PNG has a wrong checksum or is cut short; empty if none of those that matter."""
    position, view = len(filekind.PNG), memoryview(data)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        kind = bytes(view[position + 4 : position + 8])
        if end + 4 > len(data):
            return f"its part {kind!r} at byte {position} is cut short"
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return f"the checksum of its part {kind!r} at byte {position} is wrong"
        if kind == b"IEND":
            break
        position = end + 4
    return ""


@dataclass(frozen=True)
class _Tiff:
    """What the header of the first page of a TIFF says."""

    width: int
    height: int
    channels: int
    bits: int
    """Of a channel."""
    form: int
    """A key of `_SAMPLE_FORMATS`, or another number."""
    has_alpha: bool
    orientation: int

    def __str__(self) -> str:
        form = _SAMPLE_FORMATS.get(self.form, "unknown")
        return f"a TIFF image of {self.channels} channel{'s'[: self.channels - 1]}, {self.bits}-bit {form}"

    def is_picture(self) -> bool:
        """Whether it can become RGB without leaving anything out but alpha."""
        known = self.channels in (1, 3, 4) or (self.channels == 2 and self.has_alpha)
        return known and self.bits <= 16 and self.form == 1


def _tiff_header(data: bytes, name: str) -> _Tiff:
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if b"+" in data[2:4] else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        extra = tags.get(TiffImagePlugin.EXTRASAMPLES, (0,))
        return _Tiff(
            width=int(tags[TiffImagePlugin.IMAGEWIDTH]),
            height=int(tags[TiffImagePlugin.IMAGELENGTH]),
            channels=int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)),
            bits=max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))),
            form=max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))),
            has_alpha=extra[0] in (1, 2),
            orientation=int(tags.get(_ORIENTATION, 1)),
        )
    except Exception as error:  # Pillow's parser raises whatever its steps do
        raise InputError(f"{name}: a TIFF image with a damaged header: {_reason(error)}") from error


def _header_size(data: bytes, name: str) -> tuple[int, int, bool]:
    """Width and height of an image as its header has them, and whether its EXIF swaps them."""
    if data.startswith(filekind.TIFF):
        tiff = _tiff_header(data, name)
        return tiff.width, tiff.height, tiff.orientation >= 5
    # Pillow refuses to open an image of many pixels even if only its size is wanted: hence not `Image.open`
    # where a reader will do, and no reader of WebP
    webp = headers.webp_header(data)
    reader = next((r for head, r in _READERS.items() if data.startswith(head)), Image.open)
    try:
        if webp is not None:
            exif = Image.Exif()
            exif.load(webp[2])
            return webp[0], webp[1], exif.get(_ORIENTATION, 1) >= 5
        with reader(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # Pillow's parsers raise whatever their steps do
        kind = filekind.described(data)
        raise InputError(f"{name}: not an image that can be decoded ({kind}): {_reason(error)}") from error
    return width, height, turned


def _palette_indices(data: bytes, name: str) -> np.ndarray:
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            return np.array(image)
    except Exception as error:  # as above
        raise InputError(f"{name}: a damaged PNG: {_reason(error)}") from error


def _grey_of_channels(pixels: np.ndarray, data: bytes, name: str) -> np.ndarray:
    """[h,w]: the value that all colour channels of a map [h,w,channels] (B, G, R, alpha) have."""
    found = f"{name}: one value per pixel is expected, not {pixels.shape[2]} channels"
    if pixels.shape[2] not in (3, 4) or pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{found} of {pixels.dtype}: save the class ids alone, as a grey PNG")
    colors = pixels[..., :3]
    grey = bool((colors == colors[..., :1]).all())
    opaque = pixels.shape[2] == 3 or bool((pixels[..., 3] == np.iinfo(pixels.dtype).max).all())
    if grey and not opaque:
        raise InputError(
            f"{found}, grey with transparency: save the class ids, which are in the grey values or in the "
            "alpha channel, alone as a grey PNG"
        )
    if grey and not _stores_channels(data, name):
        raise InputError(f"{found}, in a kind of file that may change values: save it as a grey PNG")
    if grey:
        return np.ascontiguousarray(pixels[..., 0])
    used = [color for place, color in enumerate(("blue", "green", "red")) if colors[..., place].any()]
    if len(used) == 1:
        raise InputError(f"{found}, of which only {used[0]} is not 0: save that channel alone, as a grey PNG")
    raise InputError(f"{found}: {_colors_described(colors)}")


def _colors_described(colors: np.ndarray) -> str:
    """What a label map [h,w,3] (B, G, R) of different channels is, and what to do."""
    bits = 8 * colors.itemsize
    packed = np.zeros(colors.shape[:2], np.uint32 if bits == 8 else np.uint64)
    for place in (2, 1, 0):
        packed = packed << bits | colors[..., place]
    found = np.unique(packed).tolist()
    if len(found) > _MOST_COLORS:
        return (
            f"with {len(found)} different colours it is a picture, or a colour-coded map that was saved as "
            "JPEG or resized smoothly; a map of class ids is expected"
        )
    mask = (1 << bits) - 1
    shown = ", ".join(str((c >> 2 * bits, c >> bits & mask, c & mask)) for c in found[:3])
    more = ", ..." if len(found) > 3 else ""
    return (
        f"it is a colour-coded map of {len(found)} colours, R, G, B {shown}{more}; "
        "write the id of its class in place of each colour, as a grey or palette PNG"
    )


def _stores_channels(data: bytes, name: str) -> bool:
    """Whether a file that decodes to colours has them as they were: no palette, no loss."""
    if data.startswith(filekind.TIFF):
        return _tiff_header(data, name).channels >= 3
    if data.startswith(b"BM"):
        return int.from_bytes(data[28:30], "little") > 8  # fewer bits are indices
    return data.startswith(filekind.PNG)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
