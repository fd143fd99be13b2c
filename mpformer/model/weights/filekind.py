"""What a file is that should hold weights and does not, told from its first bytes, and what to do about it.

Downloads go wrong in a few ways that a parser's error message hides: a Git LFS pointer in place of the file,
a web page saved under its name, nothing at all, an archive that has not been unpacked.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from mpformer.filekind import known
from mpformer.types import InputError

Container = Literal["safetensors", "torch", "pickle"]

_LFS = b"version https://git-lfs"
_TORCH_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin: a pickle of their magic number."""
_HEAD = 4096
"""Bytes that are looked at."""


def container_of(file: Path) -> Container:
    """How the tensors of a file are stored, whatever the file is called.

    Raises `InputError`, saying what the file is instead, where it cannot be a file of tensors.
    """
    head, size = _head(file)
    if mistaken := mistaken_for(head, size):
        raise InputError(f"{file}: {mistaken}")
    if head.startswith(b"PK"):
        _check_zip(file)
        return "torch"
    if head.startswith(_TORCH_BEFORE_ZIP):
        return "torch"
    # a header of JSON, after its length: 100 MB are the format's own limit
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80":  # the protocol's number follows; files of protocols 0 and 1 are twenty years old
        return "pickle"
    if _is_text(head):
        raise InputError(f"{file}: is text, not weights: {_line(head)!r}")
    raise InputError(
        f"{file}: is damaged, or no file of weights: it begins with the bytes {head[:8].hex(' ')}"
    )


def mistaken_for(head: bytes, size: int) -> str | None:
    """What a file of `size` bytes that begins with `head` is, if it is something that is often taken for
    another file; None otherwise."""
    if size == 0:
        return "is empty (0 bytes): the download or copy did not finish"
    if head.startswith(_LFS):
        fields = dict(line.split(b" ", 1) for line in head.splitlines() if b" " in line)
        content = fields.get(b"size", b"?").decode("ascii", "replace")[:20]
        return (
            f"is a Git LFS pointer, not the file itself ({content} bytes): run `git lfs pull` in its folder"
        )
    if head.startswith(b"PK"):
        return None  # torch's own form is an archive
    kind = known(head)
    return None if kind is None else f"is {kind}"


def check_text(file: Path) -> None:
    """Raise `InputError` where a file of text is missing, a pointer, a web page or empty."""
    head, size = _head(file)
    if mistaken := mistaken_for(head, size):
        raise InputError(f"{file}: {mistaken}")


def _head(file: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size in bytes."""
    try:
        if not file.exists():
            link = " (a link whose target is missing)" if file.is_symlink() else ""
            raise InputError(f"{file}: there is no such file{link}")
        if not file.is_file():
            raise InputError(f"{file}: is no file but a {'folder' if file.is_dir() else 'device'}")
        with file.open("rb") as stream:
            return stream.read(_HEAD), file.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_zip(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{file}: is cut short or damaged: {error}") from None
    if not any(name.endswith("data.pkl") for name in names):
        inside = ", ".join(names[:3]) or "nothing"
        raise InputError(f"{file}: is a zip archive, not a file of torch: unpack it first; it holds {inside}")


def _is_text(head: bytes) -> bool:
    try:
        text = head[:512].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(head), 512) - 4:  # else only a character cut in two
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(c.isprintable() or c in "\r\n\t" for c in text)


def _line(head: bytes) -> str:
    return head[:60].decode("utf-8", "replace").split("\n")[0].strip()
