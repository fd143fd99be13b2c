"""Supervisely: meta.json with the classes, and in each data-set folder `img/` and `ann/`, one JSON per image.

A data set that is called train, val or test is that split; else a tag of that name on every image is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpformer import filekind
from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.image_files import annotated_size
from mpformer.data.convert.shapes import Canvas, from_base64, mask_png, numbers, pairs
from mpformer.data.convert.tree import Tree, check_distinct, known_class, read_json, split_of
from mpformer.data.records import Polygons, Rle
from mpformer.types import InputError

_AREAS = ("bitmap", "polygon", "rectangle", "any")
"""Shapes of classes that can have masks."""


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """The project whose meta.json is in the source; the classes in the order of that file."""
    metas = [
        path for path in tree.with_suffix(".json") if path.name == "meta.json" and path.parent.name != "ann"
    ]
    if len(metas) != 1:
        both = " and ".join(tree.name(path) for path in metas[:2])
        raise InputError(f"one meta.json is expected, {f'not {both}' if both else 'there is none'}")
    shapes = _class_shapes(read_json(metas[0], tree.name(metas[0])), tree.name(metas[0]))
    classes = tuple(name for name, shape in shapes.items() if shape in _AREAS)
    for name, shape in shapes.items():
        if shape not in _AREAS:
            notes.add("classes whose shapes enclose no area left out", f"{name} ({shape})")
    pictures, tags = [], []
    for path in tree.with_suffix(".json"):
        if path.parent.name == "ann":
            opened = _open(path, tree)
            if (picture := _picture(opened, shapes, tree)) is not None:
                pictures.append(picture)
                tags.append(_split_tag(opened))
    if not any(picture.split for picture in pictures) and tags and all(tags):
        pictures = [replace(picture, split=tag) for picture, tag in zip(pictures, tags)]
    labelled = {picture.image for picture in pictures}
    for image in tree.images():
        if image not in labelled:
            notes.add("images without a label file left out", tree.name(image))
    return Found(classes, tuple(pictures))


@dataclass(frozen=True)
class _Annotation:
    path: Path
    place: str
    content: dict[str, Any]


def _class_shapes(meta: Any, place: str) -> dict[str, str]:
    """Name and shape of each class."""
    kind = meta.get("projectType", "images") if isinstance(meta, dict) else "images"
    if kind not in ("images", "", None):
        raise InputError(f"{place}: a project of {kind!s:.40}; images are expected")
    listed = meta.get("classes") if isinstance(meta, dict) else None
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{place}: 'classes': a list with at least one class is expected")
    for number, item in enumerate(listed):
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), str) for key in ("title", "shape")
        ):
            raise InputError(f"{place}: class {number}: a 'title' and a 'shape' are expected")
    names = check_distinct([item["title"] for item in listed], place)
    return dict(zip(names, (item["shape"] for item in listed)))


def _open(path: Path, tree: Tree) -> _Annotation:
    place = tree.name(path)
    content = read_json(path, place)
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise InputError(f"{place}: 'objects': a list is expected")
    return _Annotation(path, place, content)


def _picture(opened: _Annotation, shapes: dict[str, str], tree: Tree) -> Picture | None:
    path, place = opened.path, opened.place
    image = _image(path, tree)
    if image is None:
        tree.notes.add("label files without their image left out", place)
        return None
    size = opened.content.get("size")
    given = (size.get("height"), size.get("width")) if isinstance(size, dict) else (None, None)
    height, width = annotated_size(image, given, place)
    canvas = Canvas(height, width, tree.notes)
    objects = []
    for number, item in enumerate(opened.content["objects"], 1):
        where = f"{place}: object {number}"
        if not isinstance(item, dict) or not isinstance(item.get("classTitle"), str):
            raise InputError(f"{where}: a 'classTitle' is expected")
        name = known_class(item["classTitle"], tuple(shapes), where)
        if (mask := _mask(item, shapes[name], canvas, where)) is not None:
            objects.append(Object(name, mask, where))
    if not objects:
        tree.notes.add("images without an object", place)
    return Picture(image, tree.name(image), height, width, tuple(objects), place, split_of(place))


def _image(path: Path, tree: Tree) -> Path | None:
    """`img/a.png` for `ann/a.png.json`, or in old projects for `ann/a.json`."""
    folder = path.parent.parent / "img"
    exact = folder / path.stem
    return exact if exact.is_file() else tree.find_image_by_stem(path.stem, folder, tree.name(path))


def _split_tag(opened: _Annotation) -> str:
    tags = opened.content.get("tags")
    names = [tag.get("name") for tag in tags if isinstance(tag, dict)] if isinstance(tags, list) else []
    splits = {split_of(f"{name}/") for name in names if isinstance(name, str)} - {""}
    return splits.pop() if len(splits) == 1 else ""


def _mask(item: dict[str, Any], class_shape: str, canvas: Canvas, where: str) -> Polygons | Rle | None:
    kind = item.get("geometryType", "bitmap" if item.get("bitmap") else class_shape)
    if kind == "bitmap":
        return _bitmap(item.get("bitmap"), canvas, where)
    if kind not in ("polygon", "rectangle"):
        canvas.notes.add("shapes that enclose no area left out", f"{where} ({kind!s:.40})")
        return None
    points = item.get("points")
    if not isinstance(points, dict):
        raise InputError(f"{where}: 'points' with an 'exterior' are expected")
    if kind == "rectangle":
        corners = pairs(points.get("exterior"), where)
        if len(corners) != 2:
            raise InputError(f"{where}: a rectangle has {len(corners)} corners, 2 are expected")
        (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
        # Supervisely's rectangles name their first and their last pixel
        return canvas.rectangle((x0, y0, x1 + 1, y1 + 1), where)
    outer = canvas.polygon(points.get("exterior"), where)
    holes = points.get("interior") or []
    if not isinstance(holes, list):
        raise InputError(f"{where}: 'interior': a list of holes is expected")
    inner = [canvas.polygon(hole, f"{where}, hole {number}") for number, hole in enumerate(holes, 1)]
    return None if outer is None else canvas.with_holes(outer, [hole for hole in inner if hole is not None])


def _bitmap(given: object, canvas: Canvas, where: str) -> Rle | None:
    if not isinstance(given, dict):
        raise InputError(f"{where}: a 'bitmap' with 'data' and 'origin' is expected")
    origin = numbers(given.get("origin"), where)
    if len(origin) != 2 or any(value != int(value) for value in origin):
        raise InputError(f"{where}: 'origin' is {given.get('origin')!r:.60}, two whole numbers are expected")
    data = from_base64(given.get("data"), where)
    if not data.startswith(filekind.PNG):
        limit = 64 + 8 * canvas.height * canvas.width + 2**20
        try:
            data = zlib.decompressobj().decompress(data, limit)
        except zlib.error as error:
            raise InputError(f"{where}: the bitmap is damaged: {error}") from None
    pixels = mask_png(data, (canvas.height, canvas.width), where)
    return canvas.bitmap(pixels, int(origin[0]), int(origin[1]), where)
