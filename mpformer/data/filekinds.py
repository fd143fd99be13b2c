"""What a file is, told from its first bytes: for messages, and to choose how an image is decoded."""

from __future__ import annotations

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little and big endian, the second two with 64-bit offsets."""

PNG_GREY, PNG_PALETTE, PNG_GREY_ALPHA = 0, 3, 4
"""Colour types of a PNG that `png_header` gives."""

_HEADS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"8BPS": "a Photoshop document",
    b"\0\0\1\0": "an icon",
    b"\0\5\x16\7": "the part of a file that macOS keeps beside it (AppleDouble): delete it",
    b"SIMPLE  =": "a FITS file",
    b"RIFF": "a RIFF file, such as WebP or AVI",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    PNG: "a PNG image",
    JPEG: "a JPEG image",
} | dict.fromkeys(TIFF, "a TIFF image")
_BOXES = {
    b"heic": "a HEIC image",
    b"heix": "a HEIC image",
    b"hevc": "a HEIC image",
    b"mif1": "a HEIF image",
    b"msf1": "a HEIF image",
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"qt  ": "a QuickTime film",
}
"""Brands of files that consist of ISO media boxes."""


def described(data: bytes) -> str:
    """What a file is, in a few words: "a PDF document", "HTML", ...; by its first bytes where unknown."""
    for head, kind in _HEADS.items():
        if data.startswith(head):
            return kind
    if data[4:8] == b"ftyp":
        return _BOXES.get(data[8:12], "a film or another file of ISO media boxes")
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if not data.strip(b"\0"):
        return f"{len(data)} bytes of zeros"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return "an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML, such as the error page of a download"
    if text.startswith(b"<?xml"):
        return "XML"
    if text.startswith((b"<", b"{", b"[")):
        return "text"
    return f"unknown; the first bytes are {data[:8].hex(' ')}"


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
