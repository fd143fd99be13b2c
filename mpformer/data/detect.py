"""Finding shards, or COCO annotations and images, in a folder that no settings describe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpformer.config import DataSet, Packed, Split
from mpformer.data.packed import is_packed
from mpformer.types import InputError

_DEPTH = 3
"""Depth of the folders that are searched."""
_WORDS = {"train": r"train", "val": r"val|test"}


def detect(place: str | Path) -> DataSet | Packed:
    """The packed data set at a place, or the COCO data set in a folder.

    The splits of COCO's JSON files are told by "train" and "val" in their paths. Raises `InputError` where
    nothing is found.
    """
    if is_packed(str(place)):
        return Packed()
    root = Path(place)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    found = {path: content for path in _json_files(root) if (content := _coco_content(path)) is not None}
    if not found:
        raise InputError(
            f"{root}: no COCO annotations in it (a JSON with 'images', 'annotations' and 'categories' whose "
            "annotations have a 'segmentation' or 'segments_info'); for another form give a recipe"
        )
    # instances before panoptic where there are both, then the usual names first
    order = sorted(found, key=lambda p: (_is_panoptic(found[p]), "instances" not in p.name, str(p)))
    named = {
        split: [p for p in order if re.search(word, str(p.relative_to(root)), re.IGNORECASE)]
        for split, word in _WORDS.items()
    }
    train = next(iter(named["train"] or [p for p in order if p not in named["val"][:1]] or order))
    of_val = named["val"][:1]
    same_form = [p for p in of_val if _is_panoptic(found[p]) == _is_panoptic(found[train])]
    val = same_form[0] if same_form else train
    panoptic = _is_panoptic(found[train])
    return DataSet(
        name=root.resolve().name,
        format="coco_panoptic" if panoptic else "coco_instance",
        train=_split(root, train, found[train], _WORDS["train"]),
        val=_split(root, val, found[val], _WORDS["val"]),
    )


def _json_files(root: Path) -> Iterator[Path]:
    for depth in range(_DEPTH):
        yield from sorted(root.glob("/".join(["*"] * depth + ["*.json"])))


def _coco_content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # no annotations; `detect` reports where there are none at all
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        return None
    if not content["images"] or not content["annotations"]:
        return None
    first = content["annotations"][0]
    return content if isinstance(first, dict) and {"segmentation", "segments_info"} & first.keys() else None


def _is_panoptic(content: dict[str, Any]) -> bool:
    return "segments_info" in content["annotations"][0]


def _split(root: Path, path: Path, content: dict[str, Any], word: str) -> Split:
    images = _folder_of(root, path, content["images"][0].get("file_name"), word)
    masks = None
    if _is_panoptic(content):
        masks = _folder_of(root, path, content["annotations"][0].get("file_name"), word)
    return Split(images=images, annotations=str(path.relative_to(root)), panoptic_masks=masks)


def _folder_of(root: Path, near: Path, name: object, word: str) -> str:
    """The folder, relative to the root, that holds a file of that name.

    Splits often use the same names, so folders with the split's word in their path come first, then the
    nearest to the JSON.
    """
    folders = [near.parent, near.with_suffix(""), root]
    for depth in range(1, _DEPTH + 1):
        folders += sorted(p for p in root.glob("/".join(["*"] * depth)) if p.is_dir())
    folders.sort(key=lambda p: not re.search(word, str(p.relative_to(root)), re.IGNORECASE))
    for folder in folders:
        if isinstance(name, str) and (folder / name).is_file():
            return str(folder.relative_to(root))
    raise InputError(f"{near}: its first image, {name!r}, is in no folder below {root}")
