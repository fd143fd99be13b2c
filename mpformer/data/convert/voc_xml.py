"""Pascal VOC's XML files in which tools add polygons to the objects, such as Roboflow and supervision."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.image_files import annotated_size
from mpformer.data.convert.shapes import Canvas
from mpformer.data.convert.tree import Tree, read_text, split_of
from mpformer.data.records import Polygons, Rle
from mpformer.types import InputError


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """Every XML file of the source; the classes are the objects' names in alphabetical order."""
    lists = _lists(tree)
    pictures = []
    for path in tree.with_suffix(".xml"):
        if (picture := _picture(path, lists, tree, options)) is not None:
            pictures.append(picture)
    if lists and pictures:
        for picture in pictures:
            if not picture.split:
                notes.add("label files in no list left out", picture.place)
        pictures = [picture for picture in pictures if picture.split]
    labelled = {picture.image for picture in pictures}
    for image in tree.images():
        if image not in labelled:
            notes.add("images without a label file left out (they are not annotated yet)", tree.name(image))
    names = sorted({each.label for picture in pictures for each in picture.objects})
    return Found(tuple(names), tuple(pictures))


def _lists(tree: Tree) -> dict[str, str]:
    """The split of each image name that ImageSets/Main lists."""
    split_of_name: dict[str, str] = {}
    for path in tree.with_suffix(".txt"):
        if path.parent.name not in ("Main", "Segmentation") or path.stem not in ("train", "val", "test"):
            continue
        for line in read_text(path, tree.name(path)).splitlines():
            if (name := line.strip()) and split_of_name.setdefault(name, path.stem) != path.stem:
                tree.notes.add("images in two splits, kept in the first", f"{tree.name(path)}: {name}")
    return split_of_name


def _picture(path: Path, lists: dict[str, str], tree: Tree, options: Options) -> Picture | None:
    place = tree.name(path)
    try:
        root = ElementTree.fromstring(read_text(path, place))
    except ElementTree.ParseError as error:
        raise InputError(f"{place}:{error.position[0]}: not valid XML: {error}") from None
    except ValueError as error:
        raise InputError(f"{place}: not valid XML: {error}") from None
    if root.tag != "annotation":
        tree.notes.add("XML files that are not VOC's left out", place)
        return None
    image = _image(path, root, tree, place)
    if image is None:
        tree.notes.add("label files without their image left out", place)
        return None
    height, width = annotated_size(image, _size(root, place), place)
    canvas = Canvas(height, width, tree.notes)
    # tools that add polygons count from 0; but supervision, which writes this, from 1 as VOC does
    origin = 1.0 if (root.findtext("source/database") or "").strip() == "roboflow.ai" else 0.0
    objects = []
    for number, item in enumerate(root.iter("object"), 1):
        where = f"{place}: object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{where}: a <name> is expected")
        if (item.findtext("deleted") or "0").strip() == "1":
            tree.notes.add("objects marked as deleted left out", where)
        elif (mask := _mask(item, origin, canvas, options, where)) is not None:
            objects.append(Object(name, mask, where))
    if not objects:
        tree.notes.add("images without an object", place)
    split = lists.get(path.stem, "") if lists else split_of(place)
    return Picture(image, tree.name(image), height, width, tuple(objects), place, split)


def _image(path: Path, root: ElementTree.Element, tree: Tree, place: str) -> Path | None:
    given = (root.findtext("filename") or "").strip()
    folders = (path.parent, path.parent.parent / "JPEGImages", path.parent.parent / "images")
    if given and (found := tree.find_image(given, folders, place)):
        return found
    for folder in folders:
        if found := tree.find_image_by_stem(path.stem, folder, place):
            if given:
                tree.notes.add(
                    "images found by the name of their label file", f"{place}: '{given}' is not there"
                )
            return found
    return None


def _size(root: ElementTree.Element, place: str) -> tuple[int | None, int | None]:
    """(height, width) as the file states it; some tools write 0 for what they do not know."""
    sides = []
    for side in ("height", "width"):
        text = (root.findtext(f"size/{side}") or "").strip()
        if text and not (text.isdecimal() and len(text) < 10):
            raise InputError(f"{place}: <{side}> is '{text:.20}', a count of pixels is expected")
        sides.append(int(text or "0"))
    return (sides[0], sides[1]) if all(sides) else (None, None)


def _mask(
    item: ElementTree.Element, origin: float, canvas: Canvas, options: Options, where: str
) -> Polygons | Rle | None:
    polygons = item.findall("polygon")
    if polygons:
        parts = [canvas.polygon(_points(polygon, origin, where), where) for polygon in polygons]
        kept = [part for part in parts if part is not None]
        return canvas.union(kept) if kept else None
    box = item.find("bndbox")
    if box is None:
        canvas.notes.add("objects without a polygon or a box left out", where)
        return None
    if not options.rectangles:
        raise InputError(
            f"{where}: a box without a <polygon>: a data set for detection has no masks; "
            "boxes=rectangles takes every box as a rectangle"
        )
    canvas.notes.add("boxes taken as rectangles", where)
    x0, y0, x1, y1 = (_number(box.findtext(key), where) for key in ("xmin", "ymin", "xmax", "ymax"))
    # VOC counts pixels from 1, and the last one belongs to the box
    return canvas.rectangle((x0 - 1, y0 - 1, x1, y1), where)


def _points(polygon: ElementTree.Element, origin: float, where: str) -> list[tuple[float, float]]:
    """The points, counted from 0.

    They stand in `<x1>..</x1><y1>..</y1>...`, in whichever order, or in `<pt><x>..</x><y>..</y></pt>...`.
    """
    pairs = polygon.findall("pt") or polygon.findall("point")
    if pairs:
        given = [(_number(p.findtext("x"), where), _number(p.findtext("y"), where)) for p in pairs]
        return [(x - origin, y - origin) for x, y in given]
    sides: dict[str, dict[int, float]] = {"x": {}, "y": {}}
    for child in polygon:
        if match := re.fullmatch(r"([xy])([0-9]{1,6})", child.tag if isinstance(child.tag, str) else ""):
            sides[match[1]][int(match[2])] = _number(child.text, where)
    if sides["x"].keys() != sides["y"].keys():
        raise InputError(f"{where}: {len(sides['x'])} x and {len(sides['y'])} y")
    return [(sides["x"][index] - origin, sides["y"][index] - origin) for index in sorted(sides["x"])]


def _number(text: str | None, where: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise InputError(f"{where}: '{text or '':.30}' is no number") from None
