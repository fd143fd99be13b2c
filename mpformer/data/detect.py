"""Finding shards, COCO annotations and images, or label maps, in a folder that no settings describe.

What is missing or broken is reported with every file that was looked at; nothing is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpformer.config import DataSet, LabelMaps, Packed, Split
from mpformer.config.yamlfile import nearest_path
from mpformer.data.coco import parse_json
from mpformer.data.convert import recognise
from mpformer.data.foldernames import held_by, split_of
from mpformer.data.mapfolders import find_label_maps
from mpformer.data.names import Files, is_litter
from mpformer.data.packed import is_packed
from mpformer.shell import command
from mpformer.types import InputError

_DEPTH = 3
"""Depth of the folders that are searched."""
_USUAL = re.compile(r"(instances|panoptic)_(train|val|valid)\d*\.json")
"""Names that JSONs of a split usually have; `_annotations.coco.json` in the split's own folder is another."""
_NAMES = 50
"""File names of a JSON that are looked up in a folder."""
_LOOKED_AT, _TOLD = 500, 12
"""JSONs that are looked at, and told of."""
_HELD_OUT = 0.2
"""Share of the images that validates where one JSON is all there is."""


@dataclass(frozen=True)
class Detected:
    """The data set in a folder, and what to know of how it was found."""

    dataset: DataSet | LabelMaps | Packed
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
    def form(self) -> Literal["coco_panoptic", "coco_instance"]:
        return "coco_panoptic" if self.panoptic else "coco_instance"

    def may_be(self, form: str) -> bool:
        """Whether it is of a form; of a broken one only its name can say that it is not."""
        if self.content:
            return self.form == form
        return ("instances" if form == "coco_panoptic" else "panoptic") not in self.path.name

    @property
    def keypoints(self) -> bool:
        """Whether it is made for keypoints; COCO's have the masks of the people, but not of the rest."""
        return "keypoint" in self.path.name.casefold() or (
            bool(self.content) and "keypoints" in self.content["annotations"][0]
        )

    @property
    def usual(self) -> bool:
        """Whether it is called as the annotations of its split usually are."""
        if self.path.name == "_annotations.coco.json":
            return self.split is not None and split_of(self.path.parent.name) == self.split
        return self.split is not None and _USUAL.fullmatch(self.path.name) is not None

    @property
    def depth(self) -> int:
        return self.name.count("/")

    @property
    def images(self) -> str:
        """How many images it lists, in words."""
        count = len(self.content["images"])
        return f"{count} image" + "s" * (count != 1)


def detect(place: str | Path, given: Mapping[str, Any] | None = None) -> Detected:
    """The packed data set at a place, or the data set in a folder: COCO annotations, else label maps.

    given: settings below `data.dataset` that are chosen already, as {"val": {"annotations": "a.json"}}.
    `format`, and of each split `annotations`, `images` and `panoptic_masks`, are taken as they are and not
    searched for; where one JSON gives both splits, so is `share`. All others are left to the caller, who
    lays what is given over what is found.

    The splits of COCO's JSON files are told by "train", "val" or "valid", and "test" in their paths. A test
    split is never used unasked. Where one JSON is all there is, a fifth of its images validates. Raises
    `InputError` where a split is missing or broken, and where two JSONs or folders may be meant.
    """
    if is_packed(str(place)):
        return Detected(Packed())
    root = Path(place)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    chosen = _Given(given or {})
    named = {split: _given_json(root, chosen, split) for split in ("train", "val")}
    found = [] if all(named.values()) else [_look(path, root) for path in _json_files(root)]
    forms = [chosen.form, *(json.form for json in named.values() if json is not None)]
    form = next((form for form in forms if form is not None), None)
    taken = [json.path.resolve() for json in named.values() if json is not None]
    others = [json for json in found if json.path.resolve() not in taken]
    val = named["val"] or _first(others, "val", form, root)
    # the given JSON of the validation split may be the one for training, too
    train = named["train"] or _first(found, "train", form, root)
    if train is None and (val is None or val is named["val"]):
        train = _first(others, None, form, root) or _first(found, None, form, root)
    if train is None and val is None and recognise(root) is None and (maps := find_label_maps(root)):
        return Detected(*maps)
    if train is None:
        what = "no COCO annotations" if val is None else "no training annotations"
        raise InputError(
            f"{root}: {what} in it (a JSON with 'images', 'annotations' and 'categories' whose annotations "
            f"have a 'segmentation' or 'segments_info'); looked at: {_listing(found)}{_way_on(root)}"
        )
    if val is not None and val.form != train.form:
        raise InputError(
            f"{root}: {train.name} and {val.name} are of two forms, instances and panoptic; choose one with "
            f"data.dataset.format=coco_instance or coco_panoptic; looked at: {_listing(found)}"
        )
    notes = [_why_not(json, train, val) for json in others if json is not train and json is not val]
    splits = {"train": _split(root, train, "train", chosen)}
    if val is not None:
        splits["val"] = _split(root, val, "val", chosen)
    else:
        notes.append(_hold_out(root, train, splits, chosen))
    name = root.resolve().name or "data"
    dataset = DataSet(name=name, format=train.form, train=splits["train"], val=splits["val"])
    told = notes[:_TOLD] + [f"and {len(notes) - _TOLD} more JSONs are not used"] * (len(notes) > _TOLD)
    return Detected(dataset, tuple(told))


class _Given:
    """What is chosen already, of settings that may be wrong: what is no setting is left to their check."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    @property
    def form(self) -> str | None:
        form = self._given.get("format")
        return form if form in ("coco_instance", "coco_panoptic") else None

    def text(self, split: str, key: str) -> str | None:
        value = self._of(split).get(key)
        return value if isinstance(value, str) and value else None

    def folders(self, split: str) -> dict[str, str]:
        found = {key: self.text(split, key) for key in ("images", "panoptic_masks")}
        return {key: folder for key, folder in found.items() if folder is not None}

    def share(self, split: str) -> tuple[float, float] | None:
        value = self._of(split).get("share")
        if not isinstance(value, list | tuple) or len(value) != 2:
            return None
        low, high = value
        numbers = all(type(v) in (int, float) for v in value)
        return (low, high) if numbers and 0 <= low < high <= 1 else None

    def _of(self, split: str) -> Mapping[str, Any]:
        value = self._given.get(split)
        return value if isinstance(value, Mapping) else {}


def _given_json(root: Path, given: _Given, split: str) -> _Json | None:
    """The JSON that is given for a split; `InputError` where it cannot be used as what is given."""
    if (name := given.text(split, "annotations")) is None:
        return None
    setting = f"data.dataset.{split}.annotations"
    looked = _look(root / name, root)
    if looked.unused:
        reason = (
            looked.unused if looked.path.is_file() else f"there is no such file{nearest_path(looked.path)}"
        )
        raise InputError(f"{looked.path}: {reason} ({setting} names it)")
    if given.form not in (None, looked.form):
        raise InputError(
            f"{looked.path}: its annotations are of {looked.form}, but data.dataset.format is {given.form} "
            f"({setting} names it)"
        )
    looked.name = name
    return looked


def _setting(key: str, value: str) -> str:
    """A setting below `data.dataset` as a shell reads it."""
    return command(f"data.dataset.{key}={value}").partition(" ")[2]


def _listing(found: Sequence[_Json]) -> str:
    told = [
        f"{j.name}: {j.unused or ('a test split' if j.split == 'test' else 'annotations')}" for j in found
    ]
    more = [f"and {len(told) - _TOLD} more"] * (len(told) > _TOLD)
    return "; ".join(told[:_TOLD] + more) or "there is no JSON"


def _why_not(json: _Json, train: _Json, val: _Json | None) -> str:
    """Why a JSON is not used, what is in its place, and the setting that takes it."""
    if json.unused:
        return f"{json.name} is not used: {json.unused}"
    if json.split == "test":
        return (
            f"{json.name} is not used: a test split ({_setting('val.annotations', json.name)} measures on it)"
        )
    split, other = ("val", val) if json.split == "val" and val is not None else ("train", train)
    way = _setting(f"{split}.annotations", json.name)
    if json.form != other.form:
        way = f"data.dataset.format={json.form}"
    return (
        f"{json.name} is not used: {other.name} ({other.images}) is taken; {way} takes this ({json.images})"
    )


def _way_on(root: Path) -> str:
    """What to do with a folder that holds another tool's annotations."""
    if (form := recognise(root)) is None:
        return "; name them, data.dataset.train.annotations=FILE, or for another form give a recipe"
    return f"; it holds {form}: {command('data', 'convert', root, 'OUT')} makes COCO annotations of it"


def _hold_out(root: Path, train: _Json, splits: dict[str, Split], given: _Given) -> str:
    """Divide the one split; returns the line that says so."""
    first, second = given.share("train"), given.share("val")
    if first is None and second is None:
        if (place := _trace_of_val(root)) is not None:
            raise InputError(_undivided(root, train, place, splits["train"]))
        if len(train.content["images"]) < 2:
            raise InputError(
                f"{train.path}: its one image cannot be both for training and for validation; name other "
                "images for that: data.dataset.val.annotations=FILE data.dataset.val.images=FOLDER, or use "
                f"this one for both: {_setting('val.annotations', train.name)}"
            )
        first, second = (0.0, 1 - _HELD_OUT), (1 - _HELD_OUT, 1.0)
    first, second = first or _rest(second, "train"), second or _rest(first, "val")
    splits["val"] = splits["train"].model_copy(update={"share": second, **given.folders("val")})
    splits["train"] = splits["train"].model_copy(update={"share": first})
    part = f"{second[1] - second[0]:.0%}"
    return (
        f"there is no validation split: {part} of the images of {train.name}, by the hash of their ids, are "
        "kept for it (data.dataset.train.share, data.dataset.val.share)"
    )


def _rest(share: tuple[float, float] | None, split: str) -> tuple[float, float]:
    """What a share of the one JSON leaves to the other split."""
    low, high = share or (0.0, 1.0)
    if low == 0 and high < 1:
        return high, 1.0
    if low > 0 and high == 1:
        return 0.0, low
    other = "val" if split == "train" else "train"
    raise InputError(
        f"data.dataset.{other}.share=[{low:g}, {high:g}] says not what is left to '{split}', which has no "
        f"annotations of its own; name them, data.dataset.{split}.annotations=FILE, or give "
        f"data.dataset.{split}.share, too"
    )


def _undivided(root: Path, train: _Json, place: str, whole: Split) -> str:
    """That a folder seems to be the validation split, whose annotations are missing; and what to do."""
    there, here = Files(root, place), Files(root, whole.images)
    names = _some_names(train.content["images"])
    # other images may have the same names
    if not any(there.has(name, elsewhere=False) and not here.has(name, elsewhere=True) for name in names):
        return (
            f"{root}: {place} seems to be the validation split, but no JSON has its annotations; name them: "
            "data.dataset.val.annotations=FILE data.dataset.val.images=FOLDER, or keep a part of "
            f"{train.name} for it: data.dataset.train.share='[0, 0.8]'"
        )
    settings = [
        _setting("train.images", whole.images),
        _setting("val.annotations", train.name),
        _setting("val.images", place),
        "data.on_bad_sample=skip",
    ]
    return (
        f"{root}: {place} seems to be the validation split, but has no annotations of its own: those of its "
        f"images are in {train.name}, with those of {whole.images}; to leave out of each split what is not "
        f"in its folder: {' '.join(settings)}"
    )


def _trace_of_val(root: Path) -> str | None:
    """A folder whose name says that it holds the validation split."""
    folders = (p for p in _folders(root) if split_of(p.name) == "val")
    return next((str(p.relative_to(root)) for p in folders), None)


def _first(found: Sequence[_Json], split: str | None, form: str | None, root: Path) -> _Json | None:
    """The JSON of a split; instances come before panoptic, and those for keypoints last.

    form: that of the data set where it is known. Among several, the one that has the usual name is taken, if
    none is nearer to the root. Raises `InputError` where that is not one, or where it is broken.
    """
    of_split = [j for j in found if j.split == split and (j.broken or not j.unused)]
    candidates = [j for j in of_split if form is None or j.may_be(form)]
    candidates = [j for j in candidates if not j.panoptic or form] or candidates
    candidates = [j for j in candidates if not j.keypoints] or candidates
    if not candidates:
        return None
    nearest = min(j.depth for j in candidates)
    usual = [j for j in candidates if j.usual and j.depth == nearest]
    candidates = usual if len(usual) == 1 else candidates
    key = f"{split or 'train'}.annotations"
    if broken := [j for j in candidates if j.broken]:
        named = f"the annotations of '{split}'" if split else "the annotations"
        raise InputError(
            f"{broken[0].path}: {broken[0].unused}; it seems to hold {named}: mend or remove it, or name "
            f"others: data.dataset.{key}=FILE; looked at: {_listing(found)}"
        )
    if len(candidates) > 1:
        both = " and ".join(f"{j.name} ({j.images})" for j in candidates[:2])
        more = f" and {len(candidates) - 2} more" * (len(candidates) > 2)
        raise InputError(
            f"{root}: {both}{more} may each be the {_PURPOSE[split]}; choose one: "
            + " or ".join(_setting(key, j.name) for j in candidates[:2])
        )
    return candidates[0]


_PURPOSE = {"train": "training annotations", "val": "validation annotations", None: "annotations"}


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
    """A JSON below the root, or a given one, which may be elsewhere."""
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
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


def _folders(root: Path) -> Iterator[Path]:
    for depth in range(1, _DEPTH + 1):
        for path in sorted(root.glob("/".join(["*"] * depth))):
            if path.is_dir() and not any(map(is_litter, path.relative_to(root).parts)):
                yield path


def _split(root: Path, json: _Json, split: str, given: _Given) -> Split:
    masks = None
    if json.panoptic:
        masks = given.text(split, "panoptic_masks") or _folder_of(root, json, split, "panoptic_masks")
    images = given.text(split, "images") or _folder_of(root, json, split, "images", taken=masks)
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
    the same names, as may the images of two splits. For that reason masks are only in a folder whose name
    says so, and images never are in one whose name says that it holds masks or pictures made of the images.
    Among the folders left that hold any, one that names the split comes first, then the fullest, then the
    nearest to the JSON. Raises `InputError` where there is none, or two are equal.
    """
    names = _some_names(json.content["images" if key == "images" else "annotations"])
    beside = [json.path.with_suffix(""), json.path.parent, root]
    right = ("masks",) if key == "panoptic_masks" else ("images", None)
    ranked: list[tuple[bool, int, int, str]] = []
    refused: list[tuple[int, str]] = []
    for elsewhere in (False, True):  # names that are paths of another machine only where there are no others
        for folder in [] if ranked else dict.fromkeys([*beside, *_folders(root)]):
            if not folder.is_dir() or not folder.is_relative_to(root):
                continue
            name = folder.relative_to(root).as_posix()
            # a given JSON may be of another split than that which it is given for
            if name == taken or split_of(name) not in (None, split, json.split):
                continue
            files = Files(root, name)
            if not (there := sum(files.has(n, elsewhere) for n in names)):
                continue
            if held_by(name, json.name) in right:
                order = beside.index(folder) if folder in beside else len(beside)
                ranked.append((split_of(name) is None, -there, order, name))
            elif (-there, name) not in refused:
                refused.append((-there, name))
    ranked.sort()
    what, setting = key.replace("_", " "), f"{split}.{key}"
    if not ranked:
        first = f"'{names[0]}' and the others" if names else "which have no 'file_name'"
        if refused:
            _, name = min(refused)
            kind = held_by(name, json.name)
            reason = f"is that of {kind}" if kind else "says nothing of masks"
            raise InputError(
                f"{json.path}: its {what}, {first}, are in no folder but {name}, whose name {reason}; name "
                f"the right one, data.dataset.{setting}=FOLDER, or if it holds them: "
                f"{_setting(setting, name)}"
            )
        raise InputError(
            f"{json.path}: its {what}, {first}, are in no folder below {root} that belongs to the split; "
            f"name it: data.dataset.{setting}=FOLDER"
        )
    if len(ranked) > 1 and ranked[0][:-1] == ranked[1][:-1]:
        raise InputError(
            f"{json.path}: its {what} are in {ranked[0][-1]} and in {ranked[1][-1]}; name one: "
            f"{_setting(setting, ranked[0][-1])} or {_setting(setting, ranked[1][-1])}"
        )
    return ranked[0][-1]
