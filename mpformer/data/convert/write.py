"""COCO's instance annotations with their images beside them, the same bytes for the same source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mpformer import atomic
from mpformer.data import masks
from mpformer.data.convert.found import Found, Notes, Object, Picture
from mpformer.data.records import Polygons, safe_relative_path
from mpformer.types import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Written:
    """One split that was written."""

    split: str
    images: int
    objects: int


def write(found: Found, out: Path, form: str, notes: Notes) -> list[Written]:
    """Write `annotations/instances_SPLIT.json` and the images of each split into its folder.

    Images come first, the JSON files last and each of them whole or not at all. Image and annotation ids
    count from 1 in each file, images in the order of their names. A split of an earlier conversion that is
    no longer there is removed. Raises `InputError` for two images of one name, `OSError`.
    """
    for name in found.classes:
        _check_text(name, "the class name")
    contents: dict[Path, str] = {}
    written = []
    by_split = _by_split(found.pictures)
    files: dict[Path, Path | bytes] = {}
    for split, pictures in by_split.items():
        named = _named(pictures)
        content = _content(found.classes, named, form, notes)
        contents[_annotations(out, split)] = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        files.update((out / split / name, picture.image) for name, picture in named.items())
        written.append(Written(split, len(content["images"]), len(content["annotations"])))
    if not any(each.objects for each in written):
        raise InputError("no object with a mask in it: there is nothing to learn")
    copies = sum(_place(image, target) for target, image in files.items())
    if copies:
        notes.add("images copied, because they cannot be hard links here", f"{copies} files")
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for path, text in contents.items():
        atomic.write_text(path, text + "\n")
    for split in SPLITS:
        if split not in by_split:
            _annotations(out, split).unlink(missing_ok=True)
    return written


def _annotations(out: Path, split: str) -> Path:
    return out / "annotations" / f"instances_{split}.json"


def _by_split(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """The pictures of each split, train alone where the source tells none."""
    without = next((picture for picture in pictures if not picture.split), None)
    having = next((picture for picture in pictures if picture.split), None)
    if without is not None and having is not None:
        raise InputError(
            f"{without.place}: in no split, but {having.place} is in '{having.split}': "
            "folders train, val and test for all, or for none, are expected"
        )
    found: dict[str, list[Picture]] = {}
    for split in SPLITS:
        if chosen := [picture for picture in pictures if (picture.split or "train") == split]:
            found[split] = chosen
    return found


def _named(pictures: list[Picture]) -> dict[str, Picture]:
    """The pictures by their `file_name`: their paths from the folder that holds them all, in order."""
    parts = [PurePosixPath(picture.name).parts for picture in pictures]
    folders = [each[:-1] for each in parts]
    shared = 0
    while all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    named: dict[str, Picture] = {}
    for picture, path in zip(pictures, parts):
        name = safe_relative_path("/".join(path[shared:]), picture.place)
        _check_text(name, f"{picture.place}: the file name")
        if name in named:
            if _same(named[name], picture):
                continue
            other = named[name].place
            raise InputError(f"{picture.place}: image {name} is labelled in {other}, too, and in another way")
        named[name] = picture
    return dict(sorted(named.items()))


def _check_text(text: str, what: str) -> None:
    """Raise `InputError` for what no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {text!r} is not UTF-8: rename it") from None


def _same(one: Picture, other: Picture) -> bool:
    """Whether two label files, such as a project and its export, say the same of an image."""

    def essence(picture: Picture) -> list[tuple[str, str]]:
        return [(each.label, json.dumps(_segmentation(each, picture))) for each in picture.objects]

    return one.image == other.image and essence(one) == essence(other)


def _content(classes: tuple[str, ...], named: dict[str, Picture], form: str, notes: Notes) -> dict[str, Any]:
    ids = {name: number for number, name in enumerate(classes, 1)}
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, picture) in enumerate(named.items(), 1):
        listed.append({"id": image_id, "file_name": name, "height": picture.height, "width": picture.width})
        for each in picture.objects:
            area = masks.area(each.mask, picture.height, picture.width)
            if not area:
                notes.add("objects that cover no pixel of their image left out", each.place)
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[each.label],
                    "segmentation": _segmentation(each, picture),
                    "area": area,
                    "bbox": masks.bounding_box(each.mask, picture.height, picture.width),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": f"{form}, converted by mpformer"},
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _segmentation(each: Object, picture: Picture) -> list[list[float]] | dict[str, Any]:
    if isinstance(each.mask, Polygons):
        return [points.ravel().tolist() for points in each.mask.parts]
    return {"size": [picture.height, picture.width], "counts": each.mask.counts.decode("ascii")}


def _place(image: Path | bytes, target: Path) -> bool:
    """Bring an image to its place, and say whether it had to be copied: a hard link needs no room."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        with atomic.replacing(target) as partial:
            partial.write_bytes(image)
        return False
    source = image.resolve()
    if target.exists() and target.samefile(source):
        return False
    with atomic.replacing(target) as partial:
        partial.unlink(missing_ok=True)  # never write into a link that a killed process left
        try:
            os.link(source, partial)
        except OSError:  # another disk, or one without links; a copy fails with the reason, if that does
            shutil.copyfile(source, partial)
            return True
    return False
