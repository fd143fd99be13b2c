"""Pascal VOC: object masks as PNGs with lists of the splits, or XML files with polygons.

SegmentationObject numbers the objects of an image, SegmentationClass gives each pixel's class, as palette
indices (the devkit) or as colours of the same palette (CVAT). 0, black, is the background; 255, nearly white,
the uncertain border.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpformer.data import headers, images, masks
from mpformer.data.convert import voc_xml
from mpformer.data.convert.found import Found, Notes, Object, Options, Picture
from mpformer.data.convert.image_files import annotated_size
from mpformer.data.convert.tree import Tree, check_distinct, read_text
from mpformer.types import InputError

_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
"""Classes 1 to 20 of the data set itself, where no labelmap.txt names others."""
_VOID = 255
_COLOR = 2**24
"""Added to a colour that stands for itself."""
_BACKGROUND = "background"


def read(tree: Tree, options: Options, notes: Notes) -> Found:
    """The data set in the source: masks where there is a folder SegmentationObject, else XML files."""
    roots = sorted({path.parent.parent for path in tree.files if path.parent.name == "SegmentationObject"})
    if len(roots) > 1:
        both = " and ".join(tree.name(path) for path in roots[:2])
        raise InputError(f"two data sets, {both}: give the folder of one")
    if not roots:
        if any(path.parent.name == "SegmentationClass" for path in tree.files):
            raise InputError(
                "SegmentationClass without SegmentationObject has no objects; "
                "for semantic training describe it as label maps (data.dataset.format: label_maps)"
            )
        return voc_xml.read(tree, options, notes)
    reader = _Masks(tree, roots[0], _palette(roots[0], tree))
    return Found(reader.palette.classes, tuple(reader.pictures()))


# --- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Palette:
    classes: tuple[str, ...]
    name_of: dict[int, str]
    """The class of each palette index; "" for background and void."""
    index_of: dict[int, int]
    """The palette index of each colour, R << 16 | G << 8 | B."""
    is_standard: bool
    """Whether the classes are those of VOC itself: no labelmap.txt names others."""


def _colormap() -> np.ndarray:
    """VOC's palette, [256,3] uint8 RGB: the bits of the index, dealt out to the channels from the top."""
    index = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((index >> (3 * level + channel) & 1) << (7 - level)).astype(np.uint8)
    return colors


def _palette(root: Path, tree: Tree) -> _Palette:
    colors = _packed(_colormap())
    index_of = {int(color): index for index, color in enumerate(colors)}
    labelmap = next((p for p in (root / "labelmap.txt", root.parent / "labelmap.txt") if p.is_file()), None)
    if labelmap is None:
        names = dict(enumerate(_CLASSES, 1))
        return _Palette(_CLASSES, {0: "", _VOID: "", **names}, index_of, True)
    place = tree.name(labelmap)
    listed: list[str] = []
    name_of = {0: "", _VOID: ""}
    for number, line in enumerate(read_text(labelmap, place).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        given = rest.partition(":")[0].strip()
        background = name.strip().lower() == _BACKGROUND
        # without a colour, the next of the palette's, as CVAT takes them
        color = (
            _color(given, f"{place}:{number}")
            if given
            else int(colors[0 if background else (len(listed) + 1) % 255])
        )
        if background:
            index_of[color] = 0
            continue
        if color == 0:
            raise InputError(f"{place}:{number}: '{name}' is black, which is the background")
        # a colour that the palette lacks gets an index behind its end; palette PNGs cannot hold it
        index = index_of.setdefault(color, 256 + len(listed))
        if name_of.get(index):
            raise InputError(f"{place}:{number}: '{name}' has the colour of '{name_of[index]}'")
        name_of[index] = name.strip()
        listed.append(name.strip())
    if not listed:
        raise InputError(f"{place}: no class in it")
    return _Palette(check_distinct(listed, place), name_of, index_of, False)


def _color(text: str, place: str) -> int:
    """A colour written as red,green,blue, packed."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 3 or not all(word.isdecimal() and len(word) < 4 and int(word) < 256 for word in words):
        raise InputError(f"{place}: name:red,green,blue:: is expected, not '{text:.60}' for the colour")
    red, green, blue = map(int, words)
    return red << 16 | green << 8 | blue


def _packed(rgb: np.ndarray) -> np.ndarray:
    wide = rgb.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


# --- masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Masks:
    tree: Tree
    root: Path
    palette: _Palette

    def pictures(self) -> list[Picture]:
        """Every image that a list names, or where there are no lists every image with a mask file."""
        found = []
        for split, names in self._listed().items():
            for name, place in names.items():
                if (picture := self._picture(name, split, place)) is not None:
                    found.append(picture)
        listed = {picture.image for picture in found}
        for image in self.tree.images(self.root / "JPEGImages"):
            if image not in listed:
                self.tree.notes.add("images of no split left out", self.tree.name(image))
        return found

    def _listed(self) -> dict[str, dict[str, str]]:
        """Image names of each split, with the line that names them."""
        folder = self.root / "ImageSets" / "Segmentation"
        lists = {path.stem: path for path in sorted(folder.glob("*.txt")) if not path.name.startswith(".")}
        splits: dict[str, Path] = {name: lists[name] for name in ("train", "val", "test") if name in lists}
        if not splits and lists:  # CVAT's default.txt, or trainval alone
            splits = {"": lists["trainval"]} if "trainval" in lists else {}
            if not splits:
                [*others] = lists.values()
                if len(others) > 1:
                    raise InputError(
                        f"{self.tree.name(folder)}: the lists {others[0].name} and {others[1].name} tell "
                        "no split; train.txt and val.txt are expected"
                    )
                splits = {"": others[0]}
        for name in lists:
            if lists[name] not in splits.values():
                self.tree.notes.add("lists passed over", self.tree.name(lists[name]))
        if not splits:
            masks_folder = self.root / "SegmentationObject"
            files = [path for path in self.tree.with_suffix(".png") if path.is_relative_to(masks_folder)]
            return {
                "": {p.relative_to(masks_folder).with_suffix("").as_posix(): self.tree.name(p) for p in files}
            }
        listed: dict[str, dict[str, str]] = {}
        splits_of: dict[str, str] = {}
        for split, path in splits.items():
            place = self.tree.name(path)
            for number, line in enumerate(read_text(path, place).splitlines(), 1):
                if not (words := line.split()):
                    continue
                name = " ".join(words)  # a name may have blanks
                if splits_of.setdefault(name, split) != split:
                    self.tree.notes.add("images in two splits", f"{place}:{number}: {name}")
                listed.setdefault(split, {}).setdefault(name, f"{place}:{number}")
        return listed

    def _picture(self, name: str, split: str, place: str) -> Picture | None:
        # not with_suffix: a name may have dots
        objects_file = self._mask_file("SegmentationObject", name)
        classes_file = self._mask_file("SegmentationClass", name)
        image = self.tree.find_image_by_stem(name, self.root / "JPEGImages", place)
        if image is None:
            self.tree.notes.add("images that are not there left out", f"{place}: {name}")
            return None
        if not objects_file.is_file():
            self.tree.notes.add("images without a mask file left out", f"{place}: {name}")
            return None
        if not classes_file.is_file():
            raise InputError(f"{self.tree.name(classes_file)}: no such file: it gives the objects' classes")
        ids = self._indices(objects_file, raw=True)
        # a labelmap.txt names colours, which a palette may hold at any index
        classes = self._indices(classes_file, raw=self.palette.is_standard)
        where = self.tree.name(objects_file)
        height, width = annotated_size(image, ids.shape, where)
        if classes.shape != ids.shape:
            raise InputError(
                f"{self.tree.name(classes_file)}: {classes.shape[1]}x{classes.shape[0]}, "
                f"but the object mask is {ids.shape[1]}x{ids.shape[0]}"
            )
        objects = tuple(self._objects(ids, classes, where))
        if not objects:
            self.tree.notes.add("images without an object", where)
        if _VOID in ids:
            self.tree.notes.add("images with uncertain pixels (255), which become background", where)
        return Picture(image, self.tree.name(image), height, width, objects, where, split)

    def _mask_file(self, folder: str, name: str) -> Path:
        path = self.root / folder / f"{name}.png"
        if "\0" in name or not path.resolve().is_relative_to(self.root.resolve()):
            raise InputError(
                f"{self.tree.name(self.root)}: image '{name:.80}': a name within {folder} is expected"
            )
        return path

    def _objects(self, ids: np.ndarray, classes: np.ndarray, where: str) -> list[Object]:
        """The objects in the order of their numbers."""
        found = []
        for number in np.unique(ids).tolist():
            if number in (0, _VOID):
                continue
            pixels = ids == number
            values, counts = np.unique(classes[pixels], return_counts=True)
            place = f"{where}: object {number}"
            if unknown := next((v for v in values.tolist() if v not in self.palette.name_of), None):
                color = f"the colour {unknown >> 16 & 255},{unknown >> 8 & 255},{unknown & 255}"
                what = color if unknown >= _COLOR else f"class {unknown}"
                raise InputError(f"{place}: {what} of SegmentationClass has no name")
            labels = {
                name: int(n) for v, n in zip(values.tolist(), counts) if (name := self.palette.name_of[v])
            }
            if len(labels) != 1:
                several = ", ".join(f"{name} ({n} pixels)" for name, n in labels.items())
                raise InputError(
                    f"{place}: one class is expected in SegmentationClass, not {several or 'none'}"
                )
            found.append(Object(next(iter(labels)), masks.run_lengths_of(pixels), place))
        return found

    def _indices(self, path: Path, *, raw: bool) -> np.ndarray:
        """A mask file as indices of VOC's palette, [h,w] int32; a colour that it lacks is 2^24 + the colour.

        `raw`: the indices of a palette PNG are taken as they are, whatever its colours.
        """
        place = self.tree.name(path)
        data = images.read_bytes(str(path))
        header = headers.png_header(data)
        kind = None if header is None else header[3]
        if kind == headers.PNG_GREY or (kind == headers.PNG_PALETTE and raw):
            return images.load_index_map(data, place).astype(np.int32)
        packed = _packed(images.load_rgb_map(data, place))
        result = np.empty(packed.shape, np.int32)
        for color in np.unique(packed).tolist():
            result[packed == color] = self.palette.index_of.get(color, _COLOR + color)
        return result
