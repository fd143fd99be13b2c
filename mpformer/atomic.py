"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a file name beside `path` to write to; it takes the place of `path` when the body ends.

    If the body or the renaming fails, `path` is left as it was and the new file is deleted. `durable`: the
    content is on disk before the name is, so that it survives a power cut. Only a killed process leaves a
    file behind, named as `leftovers` finds it. Raises what the body raises, and `OSError`.
    """
    partial = _partial(path)
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
        if durable:
            flush(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without a name
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 file of this text. Raises `OSError`, and `path` is then as it was."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _partial(path: Path) -> Path:
    """Of this thread alone: another may be writing the same file."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")


def leftovers(folder: Path) -> list[Path]:
    """Partial files in a folder, of processes that were killed (or are still writing)."""
    return list(folder.glob(".*.partial"))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
