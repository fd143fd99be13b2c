"""Finding images and label maps in a folder that no settings describe: `images/` beside `masks/`, say.

Which values there are is read from the maps; what they are called, nobody knows but the user.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpformer.config import LabelMaps, LabelSplit
from mpformer.config.data import ClassEntry
from mpformer.data.foldernames import held_by, split_of
from mpformer.data.images import load_index_map
from mpformer.data.labelmaps import IMAGE_ENDINGS
from mpformer.data.mapvalues import listed
from mpformer.data.names import is_litter
from mpformer.types import InputError

_DEPTH = 3
"""Depth of the folders that are searched."""
_READ = 400
"""Label maps of a split whose values are read."""
_MOST_CLASSES = 256
"""Values from which on maps are none of classes."""
_VOID = 255
"""What most data sets write where there is no class."""
_HELD_OUT = 0.2
"""Share of the images that validates where there is one split."""


@dataclass(frozen=True)
class _Pair:
    """A folder of images and one of their label maps, relative to the data set's folder."""

    images: str
    maps: str
    image_suffix: str
    label_suffix: str
    stems: tuple[str, ...]
    """Names of the images that have a map, without their suffix."""
    without: int
    """Images that have none."""

    @property
    def split(self) -> str | None:
        return split_of(self.maps) or split_of(self.images)


def find_label_maps(root: Path) -> tuple[LabelMaps, tuple[str, ...]] | None:
    """The data set of label maps in a folder, and what to know of how it was found; None where there is none.

    A folder that is named after masks belongs to the folder of images, of the same split, with whose names
    those of the maps begin. Without a validation split a fifth of the images is kept for it. Raises
    `InputError` where two folders may be meant, and for maps that hold no classes.
    """
    by_split: dict[str | None, list[_Pair]] = defaultdict(list)
    for pair in _pairs(root):
        by_split[pair.split].append(pair)
    by_split.pop("test", None)
    train = _only(root, [*by_split["train"], *by_split[None]])
    val = _only(root, by_split["val"])
    if train is None:
        return None
    if val is not None and (val.image_suffix, val.label_suffix) != (train.image_suffix, train.label_suffix):
        raise InputError(
            f"{root}: the images and label maps of {train.images} end in {train.image_suffix} and "
            f"{train.label_suffix}, those of {val.images} in {val.image_suffix} and {val.label_suffix}"
        )
    pairs = [pair for pair in (train, val) if pair is not None]
    values = _values(root, pairs)
    ignore = (_VOID,) if _VOID in values and len(values) > 2 else ()
    present = [value for value in values if value not in ignore]
    notes = [_found(pair) for pair in pairs]
    notes.append(
        f"the label maps hold {listed(present, 'value')}, taken as classes"
        + (f", {_VOID} as no class" if ignore else "")
    )
    if val is None:
        notes.append(
            f"there is no validation split: {_HELD_OUT:.0%} of the images, by the hash of their names, are "
            "kept for it (data.dataset.train.share, data.dataset.val.share)"
        )
    whole = val is not None
    dataset = LabelMaps(
        name=root.resolve().name or "data",
        format="label_maps",
        train=_split(train, (0.0, 1.0 if whole else 1 - _HELD_OUT)),
        val=_split(val or train, (0.0 if whole else 1 - _HELD_OUT, 1.0)),
        image_suffix=train.image_suffix,
        label_suffix=train.label_suffix,
        classes=tuple(ClassEntry(name=_name(value, present), id=value) for value in present),
        ignore=ignore,
    )
    return dataset, tuple(notes)


def _found(pair: _Pair) -> str:
    total = len(pair.stems) + pair.without
    return f"{pair.maps} holds label maps of {len(pair.stems)} of {total} images in {pair.images}"


def _split(pair: _Pair, share: tuple[float, float]) -> LabelSplit:
    chosen = {} if share == (0.0, 1.0) else {"share": share}
    return LabelSplit.model_validate({"images": pair.images, "labels": pair.maps, **chosen})


def _name(value: int, present: Sequence[int]) -> str:
    if len(present) == 2 and present[0] == 0:
        return "object" if value else "background"
    return f"class {value}"


def _only(root: Path, pairs: Sequence[_Pair]) -> _Pair | None:
    if len(pairs) > 1:
        first, second = pairs[:2]
        raise InputError(
            f"{root}: {first.maps} (of {first.images}) and {second.maps} (of {second.images}) may each hold "
            "the label maps of a split; name them in a data-set file (experiments/data/camvid.yaml is a "
            "template): data.dataset=FILE"
        )
    return pairs[0] if pairs else None


def _pairs(root: Path) -> Iterator[_Pair]:
    folders = dict(_image_folders(root))
    for maps, names in folders.items():
        if held_by(maps, "") != "masks":
            continue
        split = split_of(maps)
        candidates = (
            pair
            for images, files in folders.items()
            if images != maps
            and held_by(images, "") in ("images", None)
            and (split is None or split_of(images) in (split, None))
            if (pair := _pair(images, files, maps, names)) is not None
        )
        best = max(candidates, key=lambda pair: (pair.split == split, len(pair.stems)), default=None)
        if best is not None:
            yield best


def _image_folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders that hold image files themselves, with the names of these."""
    for depth in range(1, _DEPTH + 1):
        for folder in sorted(root.glob("/".join(["*"] * depth))):
            if not folder.is_dir() or any(map(is_litter, folder.relative_to(root).parts)):
                continue
            names = [
                path.name
                for path in sorted(folder.iterdir())
                if path.suffix.casefold() in IMAGE_ENDINGS and not is_litter(path.name)
            ]
            if names:
                yield folder.relative_to(root).as_posix(), names


def _pair(images: str, files: Sequence[str], maps: str, names: Sequence[str]) -> _Pair | None:
    """The maps whose names are those of images but for one ending, such as `_mask.png`, if most are."""
    [(image_suffix, count)] = Counter(Path(name).suffix for name in files).most_common(1)
    stems = {name.removesuffix(image_suffix) for name in files if name.endswith(image_suffix)}
    endings = Counter(name[end:] for name in names for end in range(1, len(name) + 1) if name[:end] in stems)
    if not endings:
        return None
    label_suffix, _ = max(endings.items(), key=lambda item: (item[1], -len(item[0])))
    held = set(names)
    paired = tuple(sorted(stem for stem in stems if stem + label_suffix in held))
    if 2 * len(paired) < count:
        return None
    return _Pair(images, maps, image_suffix, label_suffix, paired, count - len(paired))


def _values(root: Path, pairs: Iterable[_Pair]) -> list[int]:
    """The values of the label maps, ascending. `InputError` for maps that cannot be of classes."""
    found: Counter[int] = Counter()
    numbered = looked_at = 0
    for pair in pairs:
        places = np.unique(np.linspace(0, len(pair.stems) - 1, _READ).astype(int)).tolist()
        for place in places:
            path = str(root / pair.maps / f"{pair.stems[place]}{pair.label_suffix}")
            own = np.unique(load_index_map(path, path)).tolist()
            found.update(own)
            looked_at += 1
            numbered += _counts(own)
    if len(found) > _MOST_CLASSES or (numbered > looked_at / 2 and _differ(found, looked_at)):
        raise InputError(
            f"{root}: the {len(found)} values of {looked_at} label maps in {pair.maps} are probably "
            "numbers of objects, not classes; of such maps make COCO annotations, or one file for each "
            "object (format: mask_files, as in experiments/data/nuclei.yaml)"
        )
    return sorted(found)


def _counts(values: Sequence[int]) -> bool:
    """Whether the values of a map count from 1, or from 0, without a gap, to more than two."""
    return len(values) > 3 and values[-1] - values[0] + 1 == len(values) and values[0] in (0, 1)


def _differ(found: Mapping[int, int], maps: int) -> bool:
    """Whether the maps count to different numbers: the highest value is in few of them."""
    return found[max(found)] < maps / 2
