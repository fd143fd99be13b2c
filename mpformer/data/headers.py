"""What the headers of image files say, read without decoding them."""

from __future__ import annotations

from mpformer.filekind import JPEG, PNG

PNG_GREY, PNG_PALETTE, PNG_GREY_ALPHA = 0, 3, 4
"""Colour types of a PNG that `png_header` gives."""


def png_header(data: bytes) -> tuple[int, int, int, int] | None:
    """(width, height, bits of a channel, colour type) of a PNG; None for other files."""
    if not data.startswith(PNG) or data[12:16] != b"IHDR" or len(data) < 29:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return width, height, data[24], data[25]


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG as stored, from the header of its first frame; None where there is none."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        kind = data[position + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # tables and extensions
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        alone = kind in (0x01, 0xFF) or 0xD0 <= kind <= 0xD8  # fill bytes, and markers without content
        length = 0 if alone else int.from_bytes(data[position + 2 : position + 4], "big")
        position += (1 if kind == 0xFF else 2) + length
    return None


def webp_header(data: bytes) -> tuple[int, int, bytes] | None:
    """(width, height, EXIF) of a WebP, the EXIF empty where there is none; None for other files."""
    if not data.startswith(b"RIFF") or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":  # the extended form: sizes less one in 24 bits
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        at = data.rfind(b"EXIF") if data[20] & 8 else -1
        length = int.from_bytes(data[at + 4 : at + 8], "little") if at >= 0 else 0
        return width, height, data[at + 8 : at + 8 + length] if length else b""
    if kind == b"VP8L":  # lossless: 14 bits each, less one
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, b""
    if kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return width, height, b""
    return None


def is_cut_short(data: bytes) -> bool:
    """Whether the end mark of a JPEG or PNG is missing; cv2 would fill the rest with grey and say nothing."""
    if data.startswith(JPEG):
        # entropy-coded data never holds FF D9, so an end mark after the last scan's start is the image's own
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(PNG[:4]):
        return data.rfind(b"IEND") < 0
    return False
