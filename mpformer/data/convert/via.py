"""VGG Image Annotator 2.x (and 1.x): its project file, and its exports as JSON and CSV.

A region attribute names the class. An image belongs to the split that its label file's folder or name tells.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer.config.yamlfile import nearest
from mpformer.data import images
from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.recognise import VIA_CSV, form_of_file, form_of_json
from mpformer.data.convert.shapes import Canvas, numbers
from mpformer.data.convert.tree import Tree, read_json, read_text, split_of
from mpformer.data.records import Polygons
from mpformer.types import InputError

_ONLY_CLASS = "object"
"""The class of all regions where none has any attribute."""


@dataclass(frozen=True)
class _Region:
    shape: dict[str, Any]
    attributes: dict[str, Any]
    place: str


@dataclass
class _Entry:
    """An image that a label file lists."""

    filename: str
    regions: list[_Region]
    path: Path
    place: str


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """Every VIA file of the source; the classes are the attribute's values in alphabetical order."""
    entries: list[_Entry] = []
    for path in tree.with_suffix(".json", ".csv"):
        if path.suffix.lower() == ".csv":
            if form_of_file(path) == "via":
                entries += _csv_entries(path, tree.name(path))
            else:
                notes.add("CSV files that are not VIA's left out", tree.name(path))
            continue
        content = read_json(path, tree.name(path))
        if form_of_json(content) == "via":
            entries += _json_entries(path, content, tree.name(path))
        else:
            notes.add("JSON files that are not VIA's left out", tree.name(path))
    attribute = _attribute([region for entry in entries for region in entry.regions], options, tree)
    pictures = [p for entry in entries if (p := _picture(entry, attribute, tree)) is not None]
    listed = {picture.image for picture in pictures}
    for image in tree.images():
        if image not in listed:
            notes.add("images that no label file lists left out", tree.name(image))
    names = sorted({each.label for picture in pictures for each in picture.objects})
    return Found(tuple(names), tuple(pictures))


# --- label files ----------------------------------------------------------------------------------


def _json_entries(path: Path, content: dict[str, Any], place: str) -> Iterator[_Entry]:
    for key, image in content.get("_via_img_metadata", content).items():
        where = f"{place}: {key:.80}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise InputError(f"{where}: an image with its 'filename' is expected")
        listed = image.get("regions", [])
        if isinstance(listed, dict):  # VIA 1.x numbers them
            listed = list(listed.values())
        if not isinstance(listed, list):
            raise InputError(f"{where}: 'regions': a list is expected")
        regions = [_region(region, f"{where}: region {number}") for number, region in enumerate(listed, 1)]
        yield _Entry(image["filename"], regions, path, where)


def _region(region: Any, place: str) -> _Region:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    attributes = region.get("region_attributes", {}) if isinstance(region, dict) else None
    if not isinstance(shape, dict) or not isinstance(attributes, dict):
        raise InputError(f"{place}: 'shape_attributes' and 'region_attributes' are expected")
    return _Region(shape, attributes, place)


def _csv_entries(path: Path, place: str) -> list[_Entry]:
    text = read_text(path, place).removeprefix("#")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    entries: dict[str, _Entry] = {}
    try:
        for row in rows:
            where = f"{place}:{rows.line_num}"
            filename, shape = row.get("filename"), row.get("region_shape_attributes")
            if not filename or shape is None or row.get("region_attributes") is None:
                raise InputError(f"{where}: a row of VIA's columns is expected: {VIA_CSV},...")
            entry = entries.setdefault(filename, _Entry(filename, [], path, where))
            given = _cell(shape, where)
            if given:  # a row without a shape stands for an image without regions
                entry.regions.append(_Region(given, _cell(row["region_attributes"], where), where))
    except csv.Error as error:
        raise InputError(f"{place}:{rows.line_num}: not a CSV: {error}") from None
    return list(entries.values())


def _cell(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON object is expected, not {text:.40}")
    return value


# --- classes --------------------------------------------------------------------------------------


def _attribute(regions: list[_Region], options: Options, tree: Tree) -> str:
    """The region attribute that names the class; empty where no region has any."""
    names = sorted({name for region in regions for name in region.attributes})
    if options.attribute:
        if options.attribute not in names:
            close = nearest(options.attribute, names)
            raise InputError(f"setting 'class={options.attribute}': no region has it; nearest: {close}")
        return options.attribute
    if len(names) > 1:
        raise InputError(
            f"the regions have the attributes {', '.join(names)}: say which is the class, "
            f"for instance class={names[0]}"
        )
    return names[0] if names else ""


def _class(region: _Region, attribute: str) -> str:
    if not attribute:
        return _ONLY_CLASS
    value = region.attributes.get(attribute)
    if isinstance(value, dict):  # checkboxes
        ticked = [name for name, on in value.items() if on]
        if len(ticked) != 1:
            raise InputError(f"{region.place}: '{attribute}' has {len(ticked)} values, one class is expected")
        value = ticked[0]
    if isinstance(value, int | float) and not isinstance(value, bool):  # written by a script
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{region.place}: no value of '{attribute}', which names the class")
    return value.strip()


# --- images and shapes ----------------------------------------------------------------------------


def _picture(entry: _Entry, attribute: str, tree: Tree) -> Picture | None:
    image = tree.find_image(entry.filename, [entry.path.parent], entry.place)
    if image is None:
        tree.notes.add("images that are not there left out", f"{entry.place}: {entry.filename:.80}")
        return None
    height, width = images.image_size(str(image))
    canvas = Canvas(height, width, tree.notes)
    objects = []
    for region in entry.regions:
        if (mask := _mask(region, canvas)) is not None:
            objects.append(Object(_class(region, attribute), mask, region.place))
    if not objects:
        tree.notes.add("images without an object", entry.place)
    split = split_of(tree.name(entry.path), of_file=True) or split_of(tree.name(image))
    return Picture(image, tree.name(image), height, width, tuple(objects), entry.place, split)


def _mask(region: _Region, canvas: Canvas) -> Polygons | None:
    shape, place = region.shape, region.place
    kind = shape.get("name")
    if kind == "polygon":
        xs = numbers(shape.get("all_points_x"), place)
        ys = numbers(shape.get("all_points_y"), place)
        if len(xs) != len(ys):
            raise InputError(f"{place}: {len(xs)} x and {len(ys)} y")
        return canvas.polygon(list(zip(xs, ys)), place)
    if kind == "rect":
        x, y, width, height = _values(shape, ("x", "y", "width", "height"), place)
        return canvas.rectangle((x, y, x + width, y + height), place)
    if kind == "circle":
        x, y, radius = _values(shape, ("cx", "cy", "r"), place)
        return canvas.ellipse((x, y), (radius, radius), 0.0, place)
    if kind == "ellipse":
        x, y, rx, ry = _values(shape, ("cx", "cy", "rx", "ry"), place)
        [angle] = _values({"theta": 0.0, **shape}, ("theta",), place)
        return canvas.ellipse((x, y), (rx, ry), angle, place)
    if not isinstance(kind, str):
        raise InputError(f"{place}: a shape's 'name' is expected, not {kind!r:.40}")
    canvas.notes.add("shapes that enclose no area left out", f"{place} ({kind:.40})")
    return None


def _values(shape: dict[str, Any], names: tuple[str, ...], place: str) -> list[float]:
    if missing := next((name for name in names if name not in shape), None):
        raise InputError(f"{place}: a {shape['name']} without '{missing}'")
    return numbers([shape[name] for name in names], place)
