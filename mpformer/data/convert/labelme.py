"""LabelMe: a JSON beside each image, with polygons, rectangles, circles and bitmaps in pixels.

Shapes with the same label and `group_id` are parts of one object, as LabelMe itself takes them. A folder
called train, val or test is that split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpformer import filekind
from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.image_files import annotated_size, embedded_size
from mpformer.data.convert.recognise import form_of_json
from mpformer.data.convert.shapes import Canvas, from_base64, mask_png, numbers, pairs
from mpformer.data.convert.tree import Tree, read_json, split_of
from mpformer.data.records import Polygons, Rle
from mpformer.types import InputError

_NO_CLASS = ("_background_", "__ignore__")
"""Labels by which LabelMe's own exporters mean no object."""


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """Every LabelMe file of the source; the classes are their labels in alphabetical order."""
    pictures = []
    for path in tree.with_suffix(".json"):
        content = read_json(path, tree.name(path))
        if form_of_json(content) != "labelme":
            notes.add("JSON files that are not LabelMe's left out", tree.name(path))
        elif (picture := _picture(path, content, tree)) is not None:
            pictures.append(picture)
    labelled = {picture.image for picture in pictures}
    for image in tree.images():
        if image not in labelled:
            notes.add("images without a label file left out (they are not annotated yet)", tree.name(image))
    names = sorted({each.label for picture in pictures for each in picture.objects})
    return Found(tuple(names), tuple(pictures))


def _picture(path: Path, content: dict[str, Any], tree: Tree) -> Picture | None:
    place, named = tree.name(path), content.get("imagePath")
    given = content.get("imageHeight"), content.get("imageWidth")
    image: Path | bytes
    file = tree.find_image(named, [path.parent], place) if isinstance(named, str) and named else None
    if file is None and content.get("imageData") is None:
        file = tree.find_image_by_stem(path.stem, path.parent, place)
        if file is not None:
            tree.notes.add(
                "images found by the name of their label file", f"{place}: {named!r:.80} is not there"
            )
    if file is not None:
        image, name = file, tree.name(file)
        height, width = annotated_size(file, given, place)
    elif content.get("imageData") is not None:
        image = from_base64(content["imageData"], f"{place}: imageData")
        name = Path(place).with_suffix(_suffix(image, place)).as_posix()
        height, width = embedded_size(image, given, f"{place}: imageData")
        tree.notes.add("images taken out of their JSON (their file is not there)", place)
    else:
        tree.notes.add("label files without their image left out", f"{place}: {named!r:.80}")
        return None
    canvas = Canvas(height, width, tree.notes)
    objects = _objects(content["shapes"], canvas, place)
    if not objects:
        tree.notes.add("images without an object", place)
    return Picture(image, name, height, width, tuple(objects), place, split_of(place))


def _suffix(data: bytes, place: str) -> str:
    for start, suffix in ((filekind.PNG, ".png"), (filekind.JPEG, ".jpg")):
        if data.startswith(start):
            return suffix
    raise InputError(f"{place}: imageData: a PNG or a JPEG is expected, not {filekind.described(data)}")


def _objects(shapes: list[Any], canvas: Canvas, place: str) -> list[Object]:
    """Shapes in their order, those of one group in the place of its first."""
    parts: dict[tuple[str, object], list[Polygons | Rle]] = {}
    places: dict[tuple[str, object], str] = {}
    for number, shape in enumerate(shapes, 1):
        where = f"{place}: shape {number}"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"{where}: a 'label' is expected, not {label!r:.40}")
        group = shape.get("group_id")
        if group is not None and not isinstance(group, int | str):
            raise InputError(f"{where}: 'group_id' is {group!r:.40}, a number is expected")
        if label in _NO_CLASS:
            canvas.notes.add("shapes that mean no object left out", f"{where} ({label})")
        elif (mask := _mask(shape, canvas, where)) is not None:
            key = (label, ("alone", number) if group is None else ("group", group))
            parts.setdefault(key, []).append(mask)
            places.setdefault(key, where)
    return [Object(key[0], canvas.union(masks), places[key]) for key, masks in parts.items()]


def _mask(shape: dict[str, Any], canvas: Canvas, where: str) -> Polygons | Rle | None:
    kind, points = shape.get("shape_type"), shape.get("points")
    if kind in (None, "polygon", "oriented_rectangle"):
        return canvas.polygon(points, where)
    if kind not in ("rectangle", "circle", "mask"):
        canvas.notes.add("shapes that enclose no area left out", f"{where} ({kind})")
        return None
    corners = pairs(points, where)
    if kind == "rectangle" and len(corners) == 4:  # all corners, as some exporters write it
        return canvas.polygon(points, where)
    if len(corners) != 2:
        raise InputError(f"{where}: a {kind} has {len(corners)} points, 2 are expected")
    if kind == "rectangle":
        return canvas.rectangle(corners.ravel().tolist(), where)
    if kind == "circle":
        radius = math.dist(*corners.tolist())
        return canvas.ellipse(corners[0].tolist(), (radius, radius), 0.0, where)
    x0, y0, x1, y1 = (int(value) for value in numbers(corners.ravel().tolist(), where))
    expected = (y1 - y0 + 1, x1 - x0 + 1)  # the corner pixels are part of it
    if expected[0] > canvas.height or expected[1] > canvas.width:
        raise InputError(f"{where}: its box is larger than the {canvas.width}x{canvas.height} image")
    pixels = mask_png(from_base64(shape.get("mask"), where), expected, where)
    if pixels.shape != expected:
        raise InputError(
            f"{where}: the mask has {pixels.shape[1]}x{pixels.shape[0]} pixels, "
            f"its box {expected[1]}x{expected[0]}"
        )
    return canvas.bitmap(pixels, x0, y0, where)
