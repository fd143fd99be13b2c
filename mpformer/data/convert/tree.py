"""The files of a source folder: litter passed over, images found by the names that labels give them."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from mpformer.config.yamlfile import nearest
from mpformer.data.convert.found import Notes
from mpformer.data.names import form, is_litter
from mpformer.types import InputError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
        *(".ppm", ".pgm", ".jp2", ".avif", ".gif"),
    }
)

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders and files of a split are called."""


class Tree:
    """All files below a folder but litter, in the order of their paths.

    `leave_out` and what lies in it does not belong to it (the output, where that is inside the source).
    """

    def __init__(self, root: Path, leave_out: Path, notes: Notes) -> None:
        self.root = root
        self.notes = notes
        self.files: list[Path] = []
        visited: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # a link to a folder above it
                folders.clear()
                continue
            visited.add(real)
            for name in [*folders, *names]:
                if is_litter(name):
                    notes.add("litter passed over", self.name(Path(folder, name)))
            folders[:] = sorted(n for n in folders if not is_litter(n) and Path(folder, n) != leave_out)
            self.files += [Path(folder, name) for name in sorted(names) if not is_litter(name)]
        self.files.sort(key=lambda path: path.relative_to(root).parts)
        self._by_name: dict[str, list[Path]] = {}
        self._alike: dict[str, list[Path]] = {}
        self._by_stem: dict[Path, list[Path]] | None = None
        for path in self.images():
            self._by_name.setdefault(path.name, []).append(path)
            self._alike.setdefault(form(path.name), []).append(path)

    def keep_labels(self, path: Path) -> None:
        """Leave out every other file of a label file's kind: the user named this one alone."""
        self.files = [
            f for f in self.files if f == path or f.suffix.lower() not in (".json", ".csv", ".yaml", ".yml")
        ]

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """The files whose names end so, in any case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def images(self, folder: Path | None = None) -> list[Path]:
        """The image files, of one folder and those in it if it is given."""
        found = [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]
        return found if folder is None else [path for path in found if path.is_relative_to(folder)]

    def name(self, path: Path) -> str:
        """A path as messages and `file_name` give it: relative to the source where it lies in it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()

    def find_image(self, given: str, near: Sequence[Path], place: str) -> Path | None:
        """The image that a label file calls `given`, a path relative to one of the folders `near`.

        The file of that path, else the only one of that name in the source, or the only one whose path ends
        like the given one in most folders; else the same for names that differ in case, in the form of
        their accents or in `%20` alone. All but the first are noted. None where no file answers. Raises
        `InputError` where several do.
        """
        posix = PureWindowsPath(given).as_posix()
        for folder in (*near, self.root):
            for path in (folder / given, folder / posix):
                if exists(path) and path.is_file():
                    return Path(os.path.normpath(path))
        name = posix.rpartition("/")[2]
        for files, difference in (
            (self._by_name.get(name, []), "images found in another folder than their label says"),
            (self._alike.get(form(name), []), "images found by a name that is spelt in another way"),
        ):
            closest = _ending_like(posix, files)
            if len(closest) > 1:
                both = " and ".join(self.name(path) for path in closest[:2])
                raise InputError(f"{place}: the image '{given}' may be {both}: a path is expected")
            if closest:
                self.notes.add(difference, f"{place}: '{given}' is {self.name(closest[0])}")
                return closest[0]
        return None

    def find_image_by_stem(self, stem: str, folder: Path, place: str) -> Path | None:
        """The image of a folder whose path in it is `stem` and a suffix; None where there is none.

        Raises `InputError` where there are several.
        """
        if self._by_stem is None:
            self._by_stem = {}
            for path in self.images():
                self._by_stem.setdefault(path.with_suffix(""), []).append(path)
        files = self._by_stem.get(folder / stem, [])
        if len(files) > 1:
            both = " and ".join(self.name(path) for path in files[:2])
            raise InputError(f"{place}: the image may be {both}: one is expected")
        return files[0] if files else None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; not where the path can be none: too long, or with a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _ending_like(given: str, files: list[Path]) -> list[Path]:
    """The files that share most of the last parts of a given path with it."""

    def shared(path: Path) -> int:
        pairs = zip(reversed(given.split("/")[:-1]), reversed(path.parts[:-1]))
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    most = max(map(shared, files), default=0)
    return [path for path in files if shared(path) == most]


def split_of(name: str, *, of_file: bool = False) -> str:
    """The split that the nearest folder of a path tells (`val`, `train2017`, `my_test`); '' where none does.

    With `of_file` the name of the file may tell it, too.
    """
    *folders, file = name.split("/")
    for part in [file, *reversed(folders)] if of_file else reversed(folders):
        words = re.findall(r"[a-z]+", part.lower())
        if split := next((_SPLITS[word] for word in words if word in _SPLITS), None):
            return split
    return ""


def read_text(path: Path, place: str) -> str:
    """A UTF-8 text file, with or without a byte-order mark. `InputError` where it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{place}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, place: str) -> Any:
    """The content of a JSON file. `InputError` where it is none."""
    try:
        return json.loads(read_text(path, place))
    except json.JSONDecodeError as error:
        raise InputError(f"{place}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}") from None


def check_distinct(names: list[str], place: str) -> tuple[str, ...]:
    """Class names in their order. `InputError` where one is empty or there twice."""
    for index, name in enumerate(names):
        if not name.strip():
            raise InputError(f"{place}: class {index} has no name")
        if name in names[:index]:
            raise InputError(
                f"{place}: classes {names.index(name)} and {index} are both called '{name}': "
                "give them different names, or their objects one class"
            )
    return tuple(names)


def known_class(name: str, classes: tuple[str, ...], place: str) -> str:
    """The name, if it is one of the classes; else `InputError` with the nearest."""
    if name not in classes:
        raise InputError(f"{place}: no class '{name}'; nearest: '{nearest(name, classes)}'")
    return name
