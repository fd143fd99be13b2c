"""A reader of Pascal VOC: `JPEGImages/`, `Annotations/`, `SegmentationClass/`, `SegmentationObject/`.

    data.dataset: {name: voc, format: voc_reader:read}

The images of a split are those of `ImageSets/Segmentation/{train,val}.txt`. Object k of an image's XML is the
value k of its SegmentationObject PNG and lies in its box; objects marked difficult are read as crowds. 255 is
void.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from mpformer.data.images import load_index_map
from mpformer.data.records import MapId, NamedRecords, Record, Segment
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOID = 255
SIDES = ("xmin", "ymin", "xmax", "ymax")


def read(
    root: Path, split: str, task: str, classes: Sequence[str] = CLASSES
) -> tuple[ClassTable, "VocRecords"]:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    things = (ClassInfo(name, i, True, distinct_color(i)) for i, name in enumerate(classes, 1))
    table = ClassTable((ClassInfo("background", 0, False), *things))
    return table, VocRecords(names, str(root), table.names, task == "semantic")


@dataclass(frozen=True)
class VocRecords(NamedRecords):
    names: tuple[str, ...]
    root: str
    classes: tuple[str, ...]
    semantic: bool

    def annotation_files(self, name: str) -> list[str]:
        folders = ("SegmentationClass", "SegmentationObject")
        return [f"{self.root}/Annotations/{name}.xml", *(f"{self.root}/{f}/{name}.png" for f in folders)]

    def read_named(self, name: str) -> Record:
        xml, classes, objects = self.annotation_files(name)
        height, width, described = _annotation(xml, self.classes)
        path = classes if self.semantic else objects
        ids = load_index_map(path, path).astype(np.int32)
        if ids.shape != (height, width):
            raise InputError(f"{path}: {ids.shape[1]}x{ids.shape[0]} pixels, but {xml} has {width}x{height}")
        if self.semantic:
            described = [VocObject(label) for label in range(len(self.classes))]
        segments = []
        for value in np.unique(ids[ids != VOID]).tolist():
            if value >= len(described):
                raise InputError(f"{path}: value {value}, but 0 to {len(described) - 1} are expected")
            found = described[value]
            rows, columns = np.nonzero(ids == value)
            if not found.holds(rows, columns):
                raise InputError(f"{path}: object {value} lies outside of its box in {xml}")
            segments.append(Segment(found.label, found.difficult, MapId(value), float(len(rows)), value))
        image = f"{self.root}/JPEGImages/{name}.jpg"
        return Record(name, image, width, height, tuple(segments), ids)


@dataclass(frozen=True)
class VocObject:
    """An object of an XML; without a box it may lie anywhere."""

    label: int
    difficult: bool = False
    box: tuple[float, ...] | None = None
    """xmin, ymin, xmax, ymax in pixels, counted from 1, all inside."""

    def holds(self, rows: np.ndarray, columns: np.ndarray) -> bool:
        """Whether any of these pixels, counted from 0, is in the box."""
        if self.box is None:
            return True
        x0, y0, x1, y1 = self.box
        return bool(((columns >= x0 - 1) & (columns < x1) & (rows >= y0 - 1) & (rows < y1)).any())


def _annotation(path: str, classes: Sequence[str]) -> tuple[int, int, list[VocObject]]:
    """Height, width and objects of an XML, the background before them."""
    objects = [VocObject(0)]
    try:
        tree = ElementTree.parse(path)
        height, width = (int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
        for item in tree.iterfind("object"):
            name = item.findtext("name", "")
            if name not in classes[1:]:
                raise InputError(f"{path}: object {len(objects)}: '{name}' is none of the classes")
            box = tuple(float(item.findtext(f"bndbox/{side}", "")) for side in SIDES)
            difficult = item.findtext("difficult", "0").strip() == "1"
            objects.append(VocObject(classes.index(name), difficult, box))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: not a VOC annotation with sizes and boxes: {error}") from None
    return height, width, objects
