"""Which file an annotation means: names as tools on other systems write them; files that mean nothing."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from mpformer.data.records import relative_path
from mpformer.types import InputError

OTHER_NAMES = "file names that are written otherwise than the files"
_LITTER = {"__MACOSX", ".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "@eaDir"}
"""Left by macOS, Windows, Jupyter and Synology."""
_SIMPLE = re.compile(r"(?!\.\.?$)[^/\\:\0]+")
"""A name without a folder."""
_COMPARED = 5000
"""Names that are compared for the nearest one: comparing all of a large folder would take minutes."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name, without its path, is left by a system and means nothing."""
    return name in _LITTER or name.startswith("._")


def without_litter(paths: Iterable[Path], below: Path) -> tuple[list[Path], int]:
    """The paths no part of which, below a folder, is litter; and how many were left out."""
    listed = list(paths)
    kept = [p for p in listed if not any(map(is_litter, p.relative_to(below).parts))]
    return kept, len(listed) - len(kept)


def form(name: str) -> str:
    """What names of one file have in common: separators, percent signs, Unicode form and case set aside."""
    plain = unquote(name.replace("\\", "/"))
    return unicodedata.normalize("NFC", plain).casefold()


class Files:
    """The files below one folder of a data set, found by the names that annotations give them."""

    def __init__(self, root: Path, folder: str) -> None:
        """`folder` is relative to the root; "" or "." for the root itself."""
        self._root = root
        self._folder = "" if folder == "." else folder.rstrip("/")
        self._top = root / folder
        self._listed: dict[str, frozenset[str]] = {}

    def find(
        self, name: object, what: str, *, elsewhere: bool = True, taken: Container[str] = ()
    ) -> tuple[str, bool]:
        """(path relative to the root, whether it is written otherwise than the name).

        A name that no file has stands for the one file whose path differs in separators, percent signs,
        Unicode form or case; with `elsewhere` also for the one file like whose path it ends, if it begins
        with the folder's own name or is a path on another machine. Raises `InputError`, beginning with
        `what`, where there is none, or more than one; the message proposes no path that is `taken` (relative
        to the root).
        """
        if not isinstance(name, str) or not name.strip("/\\ ") or "\0" in name:
            raise InputError(f"{what}: 'file_name' is {name!r}, a path relative to {self._top} is expected")
        if (exact := self._exact(name)) is not None:
            return self._joined(exact), False
        found = self._alike(name, elsewhere)
        if len(found) == 1:
            return self._joined(found[0]), True
        if found:
            shown = ", ".join(sorted(found)[:3])
            raise InputError(f"{what}: '{name}' may be any of {len(found)} files in {self._top}: {shown}")
        raise InputError(f"{what}: '{name}': {self._missing(name, taken)}")

    def within(self, name: object, what: str) -> str:
        """As `find`, but the path relative to the folder."""
        path, _ = self.find(name, what)
        return path.removeprefix(f"{self._folder}/") if self._folder else path

    def has(self, name: str, elsewhere: bool) -> bool:
        """Whether `find` finds a file of that name."""
        return self._exact(name) is not None or len(self._alike(name, elsewhere)) == 1

    def _exact(self, name: str) -> str | None:
        plain = _relative(name)
        return plain if plain is not None and self._is_there(plain) else None

    def _alike(self, name: str, elsewhere: bool) -> list[str]:
        """Paths, relative to the folder, of the files that a name may stand for."""
        plain = _relative(name)
        whole = form(plain or name)
        alike = self._by_last_part.get(whole.rpartition("/")[2], [])
        found = [path for path in alike if form(path) == whole]
        if not found and elsewhere:
            found = [path for path in alike if self._is_part(whole, form(path), plain is None)]
        return found

    def _is_part(self, name: str, path: str, leaves: bool) -> bool:
        """Whether a longer name means the file at a path, both as `form` has them.

        It may be a path on another machine, which leaves the folder, or begin with the folder's own name.
        """
        return f"/{name}".endswith(f"/{path}") and (
            leaves or f"/{form(self._folder)}/{path}".endswith(f"/{name}")
        )

    def _missing(self, name: str, taken: Container[str]) -> str:
        if not self._top.is_dir():
            return f"there is no folder {self._top}"
        if not self._by_last_part:
            return f"no such file; the folder {self._top} is empty"
        where = f"no such file in {self._top}"
        if _relative(name) is None:
            where = f"the file name leaves the data folder; a path relative to {self._top} is expected"
        near = self._nearest(form(name).rpartition("/")[2], taken)
        return f"{where}; nearest: {near}" if near else where

    def _nearest(self, last: str, taken: Container[str]) -> str:
        """The file, not taken, with the same stem, or else the most similar name."""
        stem = last.rpartition(".")[0] or last
        free = {
            name: path
            for name, paths in self._by_last_part.items()
            if (path := next((p for p in paths if self._joined(p) not in taken), None)) is not None
        }
        names = list(free)
        same = [n for n in names if (n.rpartition(".")[0] or n) == stem]
        close = same or difflib.get_close_matches(last, names[:_COMPARED], n=1, cutoff=0.6)
        return free[close[0]] if close else ""

    def _joined(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _is_there(self, name: str) -> bool:
        """From one listing for each folder, instead of one look-up for each file."""
        below, _, last = name.rpartition("/")
        if below not in self._listed:
            folder = self._top / below
            self._listed[below] = frozenset(os.listdir(folder) if folder.is_dir() else ())
        return last in self._listed[below]

    @cached_property
    def _by_last_part(self) -> dict[str, list[str]]:
        """Paths relative to the folder by the form of their last part."""
        found = defaultdict(list)
        for path in sorted(walk(self._top)):
            found[form(path).rpartition("/")[2]].append(path)
        return dict(found)


def _relative(name: str) -> str | None:
    return name if _SIMPLE.fullmatch(name) else relative_path(name)


def walk(top: Path) -> Iterator[str]:
    """Files below a folder, relative to it with "/" between the parts, without litter; links are followed.

    A folder that is met again, as by a link to one above it, is not entered a second time.
    """
    entered = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_litter(name))
        below = os.path.relpath(folder, top)
        prefix = "" if below == "." else f"{below.replace(os.sep, '/')}/"
        yield from (prefix + name for name in files if not is_litter(name))
