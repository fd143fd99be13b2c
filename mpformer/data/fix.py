"""A mended copy of COCO annotations: what can only be meant in one way; the rest stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.config import Data, DataSet, Split
from mpformer.data.coco import read_json, unique_forms
from mpformer.data.fields import as_integer, as_number, is_flat_polygon, is_integer
from mpformer.data.findings import Finding, Notes, in_short
from mpformer.data.images import image_size
from mpformer.data.names import Files
from mpformer.types import InputError

_Item = dict[str, Any]


@dataclass(frozen=True)
class Mended:
    """What was done."""

    data: Data
    """The same data with the mended files."""
    lines: tuple[str, ...]
    """What was changed in each file, kind by kind."""
    settings: tuple[str, ...]
    """What names the mended files."""


def mend(data: Data, out: Path) -> Mended:
    """Write mended copies of both splits' annotation files below a folder; those with nothing to mend stay.

    Raises `InputError` for data that are not in COCO's form, and for a folder in which the originals lie.
    """
    dataset = data.dataset
    if not isinstance(dataset, DataSet):
        raise InputError(f"--fix: data in COCO's form are expected, not '{dataset.format}'")
    root = Path(data.place).resolve()
    written: dict[str, str] = {}
    lines: list[str] = []
    splits = {"train": dataset.train, "val": dataset.val}
    for split in splits.values():
        for name in filter(None, (split.annotations, split.instances)):
            if name in written:
                continue
            source = root / name
            target = (out / (source.name if Path(name).is_absolute() else name)).resolve()
            if target == source.resolve():
                raise InputError(f"--fix {out}: the mended copy would replace {source}; name another folder")
            content, changes = _mended(root, dataset, split.model_copy(update={"annotations": name}))
            written[name] = str(target) if changes else name
            if changes:
                target.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_text(target, json.dumps(content))
                lines += [f"{target}:", *(f"  {line}" for line in in_short(changes))]
            else:
                lines.append(f"{source}: nothing to mend")
    changed = {
        name: split.model_copy(
            update={
                "annotations": written[split.annotations],
                "instances": written[split.instances] if split.instances else None,
            }
        )
        for name, split in splits.items()
    }
    settings = [
        f"data.dataset.{split}.{key}={getattr(changed[split], key)}"
        for split in splits
        for key in ("annotations", "instances")
        if getattr(changed[split], key) != getattr(splits[split], key)
    ]
    mended = data.model_copy(update={"dataset": dataset.model_copy(update=changed)})
    return Mended(mended, tuple(lines), tuple(settings))


def _mended(root: Path, dataset: DataSet, place: Split) -> tuple[_Item, tuple[Finding, ...]]:
    path = root / place.annotations
    mender = _Mender(read_json(path), Notes(path))
    mender.categories(dataset.stuff)
    mender.images(root, place)
    mender.annotations(dataset.ignore_iscrowd)
    if place.panoptic_masks is not None:
        mender.names(mender.content["annotations"], Files(root, place.panoptic_masks))
    return mender.content, mender.notes.findings()


@dataclass
class _Mender:
    """One file's content, mended in place."""

    content: _Item
    notes: Notes

    def _set(self, item: _Item, key: str, value: object, what: str, kind: str) -> None:
        if type(item.get(key)) is not type(value) or item.get(key) != value:
            self.notes.add(kind, f"{what}: '{key}' {item.get(key)!r} is now {value!r}")
            item[key] = value

    def _numbers(self, item: _Item, keys: Mapping[str, Callable[[object], object]], what: str) -> None:
        for key, read in keys.items():
            if key in item:
                self._set(item, key, read(item[key]), what, "numbers in another form")

    def categories(self, stuff: tuple[str, ...] | None) -> None:
        for category in self.content["categories"]:
            what = f"category {category.get('id')}"
            self._numbers(category, {"id": as_integer, "isthing": as_integer}, what)
            if stuff is not None:
                self._set(category, "isthing", int(category.get("name") not in stuff), what, "isthing")

    def images(self, root: Path, place: Split) -> None:
        kept: list[_Item] = []
        for image in self.content["images"]:
            if image in kept[-1:] or any(
                image == other for other in kept if other.get("id") == image.get("id")
            ):
                self.notes.add("images listed twice", f"image {image.get('id')}: removed once")
                continue
            kept.append(image)
        self.content["images"] = kept
        files = Files(root, place.images)
        self.names(kept, files)
        for image in kept:
            what = f"image {image.get('id')}"
            keys = {"width": as_integer, "height": as_integer}
            self._numbers(
                image, keys | ({"id": as_integer} if isinstance(image.get("id"), float) else {}), what
            )
            if not all(is_integer(image.get(side)) and image[side] > 0 for side in keys):
                self._read_size(root, files, image, what)

    def _read_size(self, root: Path, files: Files, image: _Item, what: str) -> None:
        try:
            path, _ = files.find(image.get("file_name"), what)
            height, width = image_size(str(root / path))
        except InputError:
            return  # the check of the copy says so
        for side, value in (("width", width), ("height", height)):
            self._set(image, side, value, what, "sizes read from the files")

    def names(self, items: list[_Item], files: Files) -> None:
        for item in items:
            what = f"image {item.get('id', item.get('image_id'))}"
            try:
                path = files.within(item.get("file_name"), what)
            except InputError:
                continue  # the check of the copy says so
            self._set(item, "file_name", path, what, "file names")

    def annotations(self, ignore_iscrowd: bool) -> None:
        images = {image.get("id") for image in self.content["images"] if _hashable(image.get("id"))}
        forms = unique_forms(images)
        categories = {c.get("name"): c.get("id") for c in self.content["categories"]}
        kept: list[_Item] = []
        seen: set[str] = set()
        for annotation in self.content["annotations"]:
            what = f"annotation {annotation.get('id')}"
            given = annotation.get("image_id")
            if _hashable(given) and not (given in images and type(given) is not float):
                key = forms.get(str(as_integer(given)), given)
                self._set(annotation, "image_id", key, what, "ids of images")
            for item in (annotation, *_dicts(annotation.get("segments_info"))):
                self._fields(item, categories, ignore_iscrowd, what)
            same = json.dumps({**annotation, "id": None, "area": None}, sort_keys=True)
            if annotation.get("segmentation") and same in seen:
                self.notes.add("objects annotated twice", f"{what}: removed once")
                continue
            seen.add(same)
            kept.append(annotation)
        self.content["annotations"] = kept
        if any("segmentation" in annotation for annotation in kept):
            self._number(kept)

    def _fields(
        self, item: _Item, categories: Mapping[object, object], ignore_iscrowd: bool, what: str
    ) -> None:
        keys = {"id": as_integer, "category_id": as_integer, "iscrowd": as_integer, "area": _written_number}
        self._numbers(item, keys, what)
        if (name := item.get("category_id")) in categories and isinstance(name, str):
            self._set(item, "category_id", categories[name], what, "names of classes in the place of ids")
        if ignore_iscrowd and item.get("iscrowd"):
            self._set(item, "iscrowd", 0, what, "iscrowd")
        polygons = item.get("segmentation")
        if is_flat_polygon(polygons):
            item["segmentation"] = [polygons]
            self.notes.add("polygons wrapped", f"{what}: one flat list is now a list of one polygon")
        elif isinstance(polygons, list) and polygons and all(map(_is_pairs, polygons)):
            item["segmentation"] = [[number for pair in polygon for number in pair] for polygon in polygons]
            self.notes.add("pairs made flat", f"{what}: [[x, y], ...] is now [x, y, ...]")

    def _number(self, annotations: list[_Item]) -> None:
        """New ids in the place of those that are missing, no integer, or there before."""
        given = [a["id"] for a in annotations if is_integer(a.get("id"))]
        free, seen = max(given, default=0) + 1, set()
        for annotation in annotations:
            number = annotation.get("id")
            if is_integer(number) and number not in seen:
                seen.add(number)
                continue
            self._set(annotation, "id", free, f"annotation {number}", "ids of annotations")
            free += 1


def _written_number(value: object) -> object:
    return as_number(value) if isinstance(value, str) else value


def _hashable(value: object) -> bool:
    return isinstance(value, int | float | str)


def _dicts(value: object) -> list[_Item]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_pairs(polygon: object) -> bool:
    return (
        isinstance(polygon, list)
        and bool(polygon)
        and all(
            isinstance(p, list) and len(p) == 2 and all(isinstance(v, int | float) for v in p)
            for p in polygon
        )
    )
