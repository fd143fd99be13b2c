"""YOLO segmentation as Ultralytics trains on it: data.yaml, images, and a text file of polygons for each.

A line is `class x y x y ...`, its coordinates in 0..1 of the image as it is shown (EXIF rotation applied). An
object of several parts, or with holes, is one polygon there whose parts are joined by lines without a width,
which pycocotools draws as the parts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from mpformer.config.yamlfile import Source, read_yaml
from mpformer.data import images
from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.shapes import Canvas
from mpformer.data.convert.tree import IMAGE_SUFFIXES, Tree, check_distinct, exists, read_text, split_of
from mpformer.types import InputError

_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Keys of data.yaml that name images, and the split they are."""

_TOLERANCE = 0.01
"""How far outside of 0..1 a coordinate may lie: what Ultralytics takes, too."""


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """The data set of the one data.yaml in the source, or of a classes.txt beside labels/."""
    described, broken = [], []
    for path in tree.with_suffix(".yaml", ".yml"):
        try:
            if _describes(path, tree):
                described.append(path)
        except InputError as error:
            broken.append(error)
    if broken and not described:
        raise broken[0]
    if len(described) > 1:
        both = " and ".join(tree.name(path) for path in described[:2])
        raise InputError(f"{both} both describe a data set: give one of them in place of the folder")
    if described:
        classes, listed = _described(described[0], tree)
    else:
        classes, listed = _undescribed(tree)
    reader = _Reader(tree, options, classes)
    pictures = [
        reader.picture(image, split) for split, files in listed.items() for image in dict.fromkeys(files)
    ]
    if not any(picture.objects for picture in pictures) and not reader.labels_seen:
        raise InputError(f"none of {len(pictures)} images has a label file (labels/NAME.txt)")
    _note_labels_without_image(tree, reader.labels_seen)
    return Found(classes, tuple(pictures))


def _describes(path: Path, tree: Tree) -> bool:
    content = read_description(path, tree.name(path)).tree
    return bool({"names", "nc"} & content.keys()) and bool(_KEYS.keys() & content.keys())


def read_description(path: Path, place: str) -> Source:
    """A data.yaml, or any other YAML file. `InputError` where it is no YAML."""
    try:
        return read_yaml(path)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # a date of month 13, [a]: b
        raise InputError(f"{place}: not valid YAML: {error}") from None


def _place(source: Source, key: str, tree: Tree) -> str:
    """File and line of a key of a data.yaml."""
    return source.place([key]).replace(str(source.path), tree.name(source.path), 1)


def _described(path: Path, tree: Tree) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    """The classes and each split's images that a data.yaml names."""
    source = read_description(path, tree.name(path))
    content = source.tree
    if "kpt_shape" in content:
        raise InputError(f"{source.place(['kpt_shape'])}: a data set of keypoints has no masks to convert")
    classes = _names(source, tree)
    roots = _roots(path, content, tree)
    listed: dict[str, list[Path]] = {}
    for key, split in _KEYS.items():
        if content.get(key) is None:
            continue
        place = _place(source, key, tree)
        given = content[key] if isinstance(content[key], list) else [content[key]]
        for value in given:
            if not isinstance(value, str):
                raise InputError(
                    f"{place}: '{key}': a folder or a list of images is expected, not {value!r:.60}"
                )
            found = _resolved(value, roots)
            if found is None and split == "test":
                tree.notes.add(
                    "splits without files left out", f"{place}: '{key}' is {value}, which is not there"
                )
                continue
            if found is None:
                raise InputError(f"{place}: '{key}': there is no {value} in {' or '.join(map(str, roots))}")
            listed.setdefault(split, []).extend(_images_of(found, tree))
    for split, files in listed.items():
        if not files:
            raise InputError(f"{tree.name(path)}: no image in the split '{split}'")
    if not listed:
        raise InputError(f"{tree.name(path)}: neither 'train' nor 'val' names images")
    _note_shared(listed, tree)
    return classes, listed


def _names(source: Source, tree: Tree) -> tuple[str, ...]:
    content = source.tree
    names, count, place = content.get("names"), content.get("nc"), _place(source, "names", tree)
    if isinstance(names, dict):
        keys = list(names)
        numbered = {int(k): v for k, v in names.items() if isinstance(k, int) or str(k).isdecimal()}
        if len(numbered) < len(keys) or sorted(numbered) != list(range(len(keys))):
            raise InputError(f"{place}: 'names': class numbers 0 to {len(keys) - 1} are expected")
        names = [numbered[index] for index in sorted(numbered)]
    if names is None and isinstance(count, int) and 0 < count < 100_000:
        names = [f"class_{index}" for index in range(count)]
    if (
        not isinstance(names, list)
        or not names
        or any(isinstance(n, dict | list) or n is None for n in names)
    ):
        raise InputError(f"{place}: 'names': the list of the classes' names is expected")
    if count is not None and count != len(names):
        raise InputError(f"{source.place(['nc'])}: 'nc' is {count!r:.30}, but 'names' has {len(names)} names")
    return check_distinct([str(name) for name in names], place)


def _roots(path: Path, content: dict[str, Any], tree: Tree) -> list[Path]:
    """Folders that the paths in a data.yaml may be relative to."""
    given = content.get("path")
    if given in (None, "", "."):
        return [path.parent]
    if not isinstance(given, str):
        raise InputError(f"{tree.name(path)}: 'path': a folder is expected, not {given!r:.60}")
    named = path.parent / PureWindowsPath(given).as_posix()
    if exists(named) and named.is_dir():
        return [named]
    tree.notes.add("'path' of data.yaml is not there, its own folder is taken", f"{tree.name(path)}: {given}")
    return [path.parent]


def _resolved(value: str, roots: list[Path]) -> Path | None:
    posix = PureWindowsPath(value).as_posix()
    for root in roots:
        # Roboflow writes ../train/images for the folder train beside data.yaml, and Ultralytics reads it so
        for name in (posix, posix.removeprefix("../")):
            path = Path(os.path.normpath(root / name))
            if exists(path):
                return path
    return None


def _images_of(path: Path, tree: Tree) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    if path.is_dir():
        return (
            Tree(path, Path(), Notes()).images() if not path.is_relative_to(tree.root) else tree.images(path)
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [path]
    listed = []
    for number, line in enumerate(read_text(path, tree.name(path)).splitlines(), 1):
        if not (name := PureWindowsPath(line.strip()).as_posix()) or not line.strip():
            continue
        place = f"{tree.name(path)}:{number}"
        image = tree.find_image(name, [path.parent], place)
        if image is None:
            tree.notes.add("images that a list names and that are not there", f"{place}: {name}")
        else:
            listed.append(image)
    return listed


def _undescribed(tree: Tree) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    named = [path for path in tree.files if path.name == "classes.txt"]
    if len(named) != 1:
        raise InputError("a data.yaml with 'names' and 'train' is expected, or a classes.txt by labels/")
    lines = [line.strip() for line in read_text(named[0], tree.name(named[0])).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    classes = check_distinct(lines, tree.name(named[0]))
    listed: dict[str, list[Path]] = {}
    for image in tree.images():
        listed.setdefault(split_of(tree.name(image)), []).append(image)
    if not listed:
        raise InputError("no image in it")
    return classes, listed


def _note_shared(listed: dict[str, list[Path]], tree: Tree) -> None:
    splits: dict[Path, list[str]] = {}
    for split, files in listed.items():
        for file in dict.fromkeys(files):
            splits.setdefault(file, []).append(split)
    for file, among in splits.items():
        if len(among) > 1:
            tree.notes.add("images in two splits", f"{tree.name(file)} ({' and '.join(among)})")


def _note_labels_without_image(tree: Tree, seen: set[Path]) -> None:
    folders = {path.parent for path in seen}
    for path in tree.with_suffix(".txt"):
        in_labels = "labels" in path.relative_to(tree.root).parts[:-1]
        if path not in seen and path.name != "classes.txt" and (in_labels or path.parent in folders):
            tree.notes.add("label files without an image in any split left out", tree.name(path))


@dataclass
class _Reader:
    tree: Tree
    options: Options
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        self.labels_seen: set[Path] = set()

    def picture(self, image: Path, split: str) -> Picture:
        """One image with the polygons of its label file."""
        height, width = images.image_size(str(image))
        label = _label_file(image)
        objects: tuple[Object, ...] = ()
        place = self.tree.name(label)
        if label.is_file():
            self.labels_seen.add(label)
            canvas = Canvas(height, width, self.tree.notes)
            objects = tuple(self._objects(label, place, canvas))
            if not objects:
                self.tree.notes.add("images without an object (their label file is empty)", place)
        else:
            self.tree.notes.add("images without an object (they have no label file)", self.tree.name(image))
        return Picture(image, self.tree.name(image), height, width, objects, place, split)

    def _objects(self, label: Path, place: str, canvas: Canvas) -> Iterator[Object]:
        seen: set[tuple[str, ...]] = set()
        for number, line in enumerate(read_text(label, place).splitlines(), 1):
            words = tuple(line.split())
            where = f"{place}:{number}"
            if not words:
                continue
            if words in seen:
                self.tree.notes.add("lines that are there twice taken once", where)
                continue
            seen.add(words)
            name = self._class(words[0], where)
            points = self._points(words[1:], where) * (canvas.width, canvas.height)
            if (mask := canvas.polygon(points.tolist(), where)) is not None:
                yield Object(name, mask, where)

    def _class(self, word: str, where: str) -> str:
        number = _number(word, where)
        if number != int(number) or not 0 <= number < len(self.classes):
            raise InputError(f"{where}: class {word}, but the data set has 0 to {len(self.classes) - 1}")
        return self.classes[int(number)]

    def _points(self, words: tuple[str, ...], where: str) -> np.ndarray:
        """The polygon's points in 0..1, [n,2]."""
        values = [_number(word, where) for word in words]
        if len(values) in (4, 5):  # with a confidence or a track behind it, which is not in 0..1
            if not self.options.rectangles:
                raise InputError(
                    f"{where}: a box, but a polygon (class x y x y x y ...) is expected: a data set "
                    "for detection has no masks; boxes=rectangles takes every box as a rectangle"
                )
            x, y, width, height = self._relative(values[:4], where)
            if width < 0 or height < 0:
                raise InputError(f"{where}: a box of size {width:g} x {height:g}")
            self.tree.notes.add("boxes taken as rectangles", where)
            left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
            return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        if len(values) < 6 or len(values) % 2:
            raise InputError(
                f"{where}: {len(values)} numbers behind the class; x y of at least three points are expected"
            )
        return np.array(self._relative(values, where)).reshape(-1, 2)

    def _relative(self, values: list[float], where: str) -> list[float]:
        if wrong := [v for v in values if not -_TOLERANCE <= v <= 1 + _TOLERANCE]:
            pixels = ": these look like pixels" if max(values) > 2 else ""
            raise InputError(
                f"{where}: a coordinate of {wrong[0]:g}; 0..1 of the image's size is expected{pixels}"
            )
        if any(not 0 <= v <= 1 for v in values):
            self.tree.notes.add("coordinates up to 0.01 outside of 0..1, kept", where)
        return values


def _number(word: str, where: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise InputError(f"{where}: '{word:.40}' is no number; a line is: class x y x y x y ...") from None
    if not math.isfinite(value):
        raise InputError(f"{where}: '{word}' is no finite number")
    return value


def _label_file(image: Path) -> Path:
    """`labels/` in the place of the last `images/` of the path, as Ultralytics does; or beside the image."""
    parts = list(image.parent.parts)
    for index in range(len(parts) - 1, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts, image.stem + ".txt")
