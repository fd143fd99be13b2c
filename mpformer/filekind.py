"""What a file is, told from its first bytes: for messages on files that are taken for others."""

from __future__ import annotations

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little and big endian, the second two with 64-bit offsets."""


_HEADS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it first",
    b"GGUF": "a GGUF file",
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


def known(data: bytes) -> str | None:
    """What a file is, in a few words, where its first bytes tell: "a PDF document", ..."""
    for head, kind in _HEADS.items():
        if data.startswith(head):
            return kind
    if data[4:8] == b"ftyp":
        return _BOXES.get(data[8:12], "a film or another file of ISO media boxes")
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if data[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        return "a web page (HTML), such as the error page of a download"
    if b"<svg" in text:
        return "an SVG drawing"
    if text.startswith(b"<?xml"):
        return "XML, such as the error message of a bucket"
    return None


def described(data: bytes) -> str:
    """As `known`; "text", zeros, or the first bytes where it is not."""
    if (kind := known(data)) is not None:
        return kind
    if not data.strip(b"\0"):
        return f"{len(data)} bytes of zeros"
    if data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"<", b"{", b"[")):
        return "text"
    return f"unknown; the first bytes are {data[:8].hex(' ')}"
