"""Finding shards, or COCO annotations and images, in a folder that no settings describe.

What is missing or broken is reported with every file that was looked at; nothing is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpformer.config import DataSet, Packed, Split
from mpformer.data.coco import parse_json
from mpformer.data.convert import recognise
from mpformer.data.names import Files, is_litter
from mpformer.data.packed import is_packed
from mpformer.shell import command
from mpformer.types import InputError

_DEPTH = 3
"""Depth of the folders that are searched."""
_SPLIT = re.compile(
    r"(?P<train>train(ing|val)?|minitrain)|(?P<val>val(id|idation)?|minival|dev)|(?P<test>test(ing|dev)?)"
)
_SPLIT_TAIL = r"(set|split|data|images?|imgs?|labels?|masks?|annotations?|coco)?"
_MASKS = re.compile(r"panoptic|mask|label|annot|segm|instance|_gt\b", re.IGNORECASE)
"""Names of folders that hold masks rather than images."""
_NAMES = 50
"""File names of a JSON that are looked up in a folder."""
_LOOKED_AT, _TOLD = 500, 12
"""JSONs that are looked at, and told of."""
_HELD_OUT = 0.2
"""Share of the images that validates where one JSON is all there is."""


@dataclass(frozen=True)
class Detected:
    """The data set in a folder, and what to know of how it was found."""

    dataset: DataSet | Packed
    notes: tuple[str, ...] = ()


@dataclass
class _Json:
    """A JSON that was looked at."""

    path: Path
    name: str
    """Its path relative to the data set's folder."""
    split: str | None
    """"train", "val" or "test" where its path says so."""
    content: dict[str, Any] = field(default_factory=dict)
    """Of a COCO file that can be used; else empty."""
    unused: str = ""
    """Why it cannot be used; empty where it can."""
    broken: bool = False
    """Whether it may be meant for the annotations of its split, but cannot be read as such."""

    @property
    def panoptic(self) -> bool:
        if self.content:
            return "segments_info" in self.content["annotations"][0]
        return "panoptic" in self.path.name

    @property
    def order(self) -> tuple[bool, bool, str]:
        """Instances before panoptic where there are both, then the usual names first."""
        return self.panoptic, "instances" not in self.path.name, self.name


def detect(place: str | Path) -> Detected:
    """The packed data set at a place, or the COCO data set in a folder.

    The splits of COCO's JSON files are told by "train", "val" or "valid", and "test" in their paths. A test
    split is never used unasked. Where one JSON is all there is, a fifth of its images validates. Raises
    `InputError` where a split is missing or broken.
    """
    if is_packed(str(place)):
        return Detected(Packed())
    root = Path(place)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    found = [_look(path, root) for path in _json_files(root)]
    train, val = (_first(found, split, root) for split in ("train", "val"))
    if train is None and val is None:
        train = _first(found, None, root)
    if train is None:
        what = "no COCO annotations" if val is None else "no training annotations"
        raise InputError(
            f"{root}: {what} in it (a JSON with 'images', 'annotations' and 'categories' whose annotations "
            f"have a 'segmentation' or 'segments_info'); looked at: {_listing(found)}{_way_on(root)}"
        )
    if val is not None and val.panoptic != train.panoptic:
        raise InputError(
            f"{root}: {train.name} and {val.name} are of two forms, instances and panoptic; looked at: "
            f"{_listing(found)}"
        )
    splits = {"train": _split(root, train, "train")}
    notes = [_why_not(json) for json in found if json is not train and json is not val]
    if val is not None:
        splits["val"] = _split(root, val, "val")
    else:
        notes.append(_hold_out(root, train, splits))
    name = root.resolve().name or "data"
    form: Literal["coco_panoptic", "coco_instance"] = "coco_panoptic" if train.panoptic else "coco_instance"
    dataset = DataSet(name=name, format=form, train=splits["train"], val=splits["val"])
    told = notes[:_TOLD] + [f"and {len(notes) - _TOLD} more JSONs are not used"] * (len(notes) > _TOLD)
    return Detected(dataset, tuple(told))


def _listing(found: Sequence[_Json]) -> str:
    told = [
        f"{j.name}: {j.unused or ('a test split' if j.split == 'test' else 'annotations')}" for j in found
    ]
    more = [f"and {len(told) - _TOLD} more"] * (len(told) > _TOLD)
    return "; ".join(told[:_TOLD] + more) or "there is no JSON"


def _why_not(json: _Json) -> str:
    if json.unused:
        return f"{json.name} is not used: {json.unused}"
    if json.split == "test":
        return f"{json.name} is not used: a test split (data.dataset.val.annotations measures on it)"
    return f"{json.name} is not used: another of its split comes first"


def _way_on(root: Path) -> str:
    """What to do with a folder that holds another tool's annotations."""
    if (form := recognise(root)) is None:
        return "; for another form give a recipe"
    return f"; it holds {form}: {command('data', 'convert', root, 'OUT')} makes COCO annotations of it"


def _hold_out(root: Path, train: _Json, splits: dict[str, Split]) -> str:
    """Divide the one split; returns the line that says so."""
    if (place := _trace_of_val(root)) is not None:
        raise InputError(
            f"{root}: {place} seems to be the validation split, but no JSON has its annotations; name them: "
            "data.dataset.val.annotations=FILE data.dataset.val.images=FOLDER"
        )
    whole, first = splits["train"], 1 - _HELD_OUT
    splits["train"] = whole.model_copy(update={"share": (0.0, first)})
    splits["val"] = whole.model_copy(update={"share": (first, 1.0)})
    return (
        f"there is no validation split: {_HELD_OUT:.0%} of the images of {train.name}, by the hash of their "
        "ids, are kept for it (data.dataset.train.share, data.dataset.val.share)"
    )


def _trace_of_val(root: Path) -> str | None:
    """A folder whose name says that it holds the validation split."""
    folders = (p for p in _folders(root) if split_of(p.name) == "val")
    return next((str(p.relative_to(root)) for p in folders), None)


def _first(found: Sequence[_Json], split: str | None, root: Path) -> _Json | None:
    """The JSON of a split; `InputError` where the one that comes first is broken."""
    of_split = sorted((j for j in found if j.split == split), key=lambda j: j.order)
    candidates = [j for j in of_split if j.broken or not j.unused]
    if not candidates:
        return None
    if candidates[0].broken:
        named = f"the annotations of '{split}'" if split else "the annotations"
        raise InputError(
            f"{candidates[0].path}: {candidates[0].unused}; it seems to hold {named}: mend or remove it; "
            f"looked at: {_listing(found)}"
        )
    return candidates[0]


def _json_files(root: Path) -> Iterator[Path]:
    looked_at = 0
    for depth in range(_DEPTH):
        for path in sorted(root.glob("/".join(["*"] * depth + ["*.json"]))):
            if path.is_file() and not any(map(is_litter, path.relative_to(root).parts)):
                looked_at += 1
                if looked_at > _LOOKED_AT:
                    return
                yield path


def _look(path: Path, root: Path) -> _Json:
    name = path.relative_to(root).as_posix()
    looked = _Json(path, name, split_of(name))
    try:
        content = parse_json(path)
    except InputError as error:
        looked.unused, looked.broken = str(error).removeprefix(f"{path}: "), True
        return looked
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not any(key in content for key in keys):
        looked.unused = recognise(path) or "no COCO annotations"
        return looked
    if missing := [key for key in keys if not isinstance(content.get(key), list)]:
        # COCO's captions and test images lack one of them
        looked.unused = f"no list '{missing[0]}'"
        looked.broken = missing == ["annotations"] and looked.split != "test"
        return looked
    if empty := [key for key in keys if not content[key]]:
        looked.unused, looked.broken = f"'{empty[0]}' is empty", True
        return looked
    first = content["annotations"][0]
    if not isinstance(first, dict) or not {"segmentation", "segments_info"} & first.keys():
        looked.unused = "its annotations have neither 'segmentation' nor 'segments_info'"
        return looked
    looked.content = content
    return looked


def split_of(name: str) -> str | None:
    """The split that a path names: in its last part, or else in the nearest folder that names one."""
    for part in reversed(name.split("/")):
        for word in re.findall(r"[a-z]+", part.casefold()):
            if (match := re.fullmatch(f"({_SPLIT.pattern}){_SPLIT_TAIL}", word)) is not None:
                return next(split for split in ("train", "val", "test") if match[split])
    return None


def _folders(root: Path) -> Iterator[Path]:
    for depth in range(1, _DEPTH + 1):
        for path in sorted(root.glob("/".join(["*"] * depth))):
            if path.is_dir() and not any(map(is_litter, path.relative_to(root).parts)):
                yield path


def _split(root: Path, json: _Json, split: str) -> Split:
    masks = None
    if json.panoptic:
        masks = _folder_of(root, json, split, "panoptic_masks")
    images = _folder_of(root, json, split, "images", taken=masks)
    return Split(images=images, annotations=json.name, panoptic_masks=masks)


def _some_names(items: Sequence[dict[str, Any]]) -> list[str]:
    """File names spread over the items."""
    places = np.unique(np.linspace(0, len(items) - 1, _NAMES).astype(int)).tolist()
    names = [items[i].get("file_name") for i in places if isinstance(items[i], dict)]
    return [name for name in names if isinstance(name, str)]


def _folder_of(
    root: Path, json: _Json, split: str, key: Literal["images", "panoptic_masks"], taken: str | None = None
) -> str:
    """The folder, relative to the root, that holds the files of a JSON's images or id PNGs.

    A folder that names another split is none, nor is `taken`, that of the masks: images and masks may have
    the same names, as may the images of two splits. So among those that hold any, one that looks like images
    (or masks) comes first, then one that names the split, then the fullest, then the nearest to the JSON.
    Raises `InputError` where there is none, or two are equal.
    """
    names = _some_names(json.content["images" if key == "images" else "annotations"])
    beside = [json.path.with_suffix(""), json.path.parent, root]
    ranked: list[tuple[bool, bool, int, int, str]] = []
    for elsewhere in (False, True):  # names that are paths of another machine only where there are no others
        for folder in [] if ranked else dict.fromkeys([*beside, *_folders(root)]):
            name = folder.relative_to(root).as_posix()
            if not folder.is_dir() or name == taken or split_of(name) not in (None, split):
                continue
            files = Files(root, name)
            if there := sum(files.has(n, elsewhere) for n in names):
                looks_right = bool(_MASKS.search(name)) == (key == "panoptic_masks")
                order = beside.index(folder) if folder in beside else len(beside)
                ranked.append((not looks_right, split_of(name) is None, -there, order, name))
    ranked.sort()
    setting = f"data.dataset.{split}.{key}"
    if not ranked:
        first = f"'{names[0]}' and the others" if names else "which have no 'file_name'"
        raise InputError(
            f"{json.path}: its {key.replace('_', ' ')}, {first}, are in no folder below {root} that belongs "
            f"to the split; name it: {setting}=FOLDER"
        )
    if len(ranked) > 1 and ranked[0][:-1] == ranked[1][:-1]:
        raise InputError(
            f"{json.path}: its {key.replace('_', ' ')} are in {ranked[0][-1]} and in {ranked[1][-1]}; name "
            f"one: {setting}={ranked[0][-1]}"
        )
    return ranked[0][-1]
