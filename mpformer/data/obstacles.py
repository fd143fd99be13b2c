"""What a split as a whole cannot be used for: nothing in it to learn, or nothing to measure.

`data check` concludes from all records, a run at its start from some of them, so that what stops one stops
the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mpformer.config import Data, DataSet, LabelMaps
from mpformer.cores import usable_cores
from mpformer.data import augment
from mpformer.data.findings import Finding, Weight, in_short
from mpformer.data.inspection import Inspected, inspect
from mpformer.data.records import Catalog, Record
from mpformer.types import InputError

_AT_START, _ON_SUSPICION = 24, 1000
"""Records that a run inspects at its start; and if these suggest an obstacle, before it says so."""
_PASSED_OVER = 20
"""Records without an object that are passed over for each one that is inspected."""
_CELL = 4
"""Side of the cells in which masks are predicted, in pixels of the training image."""
_DARK = 15
"""Images none of whose values exceeds it are nearly black."""
_MOST_BITS = 14
"""16-bit files all of which use no more are taken to have a lower depth."""


@dataclass(frozen=True)
class _Split:
    """A split and what was seen of its records."""

    catalog: Catalog
    data: Data
    training: bool
    inspected: Sequence[Inspected]
    """Of all records, or of some that have objects, if any was found."""
    complete: bool
    """Whether all were inspected."""

    @property
    def usable(self) -> list[Inspected]:
        return [one for one in self.inspected if one.usable]

    def obstacle(self, kind: str, text: str) -> Finding:
        seen = "" if self.complete else f" (of {len(self.inspected)} images looked at)"
        return Finding(kind, f"{self.catalog.name}: {text}{seen}", Weight.OBSTACLE)


def obstacles(
    catalog: Catalog, data: Data, split: str, inspected: Sequence[Inspected], complete: bool = True
) -> tuple[Finding, ...]:
    """What hinders a split ("train" or "val") from being trained on, or measured.

    `inspected`: what was seen of all its records, or, if not `complete`, of some with objects.
    """
    if any(f.weight is Weight.OBSTACLE for f in catalog.findings):
        return ()  # all that would be found follows from it
    seen = _Split(catalog, data, split == "train", inspected, complete)
    for rule in (_nothing_usable, _channels_turned, _lost_to_ignore, _no_object):
        if (finding := rule(seen)) is not None:
            return (finding,)  # all others follow from it
    return tuple(f for f in (rule(seen) for rule in (_too_few_bits, _too_dark, _too_small)) if f is not None)


def require_usable(data: Data, splits: Mapping[str, Catalog]) -> None:
    """Raise `InputError` where an obstacle is found in a split ("train", "val") from some of its records.

    Under `on_bad_sample: error` so does a record among them that cannot be used.
    """
    for name, catalog in splits.items():
        found: Sequence[Finding] = [f for f in catalog.findings if f.weight is Weight.OBSTACLE]
        for count in (_AT_START, _ON_SUSPICION):
            if found:
                break
            chosen = _spread(catalog, count)
            inspected = inspect_all(catalog.records[i] for i in chosen)
            complete = len(chosen) == len(catalog)
            if data.on_bad_sample == "error":
                for finding in (f for one in inspected for f in one.findings if f.weight is Weight.FAULT):
                    raise InputError(finding.text)
            found = obstacles(catalog, data, name, inspected, complete)
            if not found or complete:
                break
            if count == _AT_START:
                found = []  # suspected only
        if found:
            raise InputError("; ".join(in_short(found)))


def inspect_all(records: Iterable[Record]) -> list[Inspected]:
    """What is seen of each record, in order."""
    with ThreadPoolExecutor(usable_cores()) as pool:  # decoding and rasterising release the GIL
        return list(pool.map(inspect, records))


def _spread(catalog: Catalog, count: int) -> list[int]:
    """Places of up to that many records with objects, spread over the split; any, where none is found."""
    order = np.unique(np.linspace(0, len(catalog) - 1, min(len(catalog), _PASSED_OVER * count)).astype(int))
    if len(order) <= count:
        return order.tolist()
    # first some over the whole range, then those between
    order = np.concatenate([order[start::_PASSED_OVER] for start in range(_PASSED_OVER)])
    with_objects: list[int] = []
    for place in order.tolist():
        record = catalog.records[place]
        if record.problem or any(not s.crowd for s in record.segments):
            with_objects.append(place)
        if len(with_objects) == count:
            break
    return sorted(with_objects or order[:count].tolist())


# --- the rules ------------------------------------------------------------------------------------


def _nothing_usable(split: _Split) -> Finding | None:
    if split.usable or not split.inspected:
        return None
    first = split.inspected[0].findings[0].text
    return split.obstacle("no image that can be used", f"none of {len(split.inspected)}; the first: {first}")


def _channels_turned(split: _Split) -> Finding | None:
    mapped = [one for one in split.usable if one.segments]
    turned = sum(one.channels_turned for one in mapped)
    if turned * 2 <= len(mapped):
        return None
    return split.obstacle(
        "ids in another order of channels",
        f"the maps of {turned} images hold their segments' ids in the channels B, G, R; they were probably "
        "written by OpenCV, which takes B, G, R: exchange R and B, so that the id is R + 256 G + 65536 B",
    )


def _lost_to_ignore(split: _Split) -> Finding | None:
    dataset, classes = split.data.dataset, split.catalog.classes
    if not isinstance(dataset, LabelMaps) or len(classes) < 2:
        return None
    seen = {label for one in split.usable for label in one.labels}
    pixels: Counter[int] = Counter()
    for one in split.usable:
        pixels.update(one.unknown)
    if len(seen) > 1 or not pixels:
        return None
    value, count = pixels.most_common(1)[0]
    share = 100 * count / sum(one.size[0] * one.size[1] for one in split.usable)
    if share < 1:
        return None
    lost = next(info for i, info in enumerate(classes.classes) if i not in seen)
    found = f"only '{classes.names[min(seen)]}'" if seen else "none"
    return split.obstacle(
        "classes lost to the values to ignore",
        f"of {len(classes)} classes {found} occurs, and the ignored value {value} covers {share:.1f} % of "
        f"the pixels: it is probably the value of '{lost.name}' (now {lost.source_id}): set that class's id "
        f"to {value} in data.dataset.classes, and take {value} out of data.dataset.ignore",
    )


def _no_object(split: _Split) -> Finding | None:
    kind = "nothing to learn" if split.training else "nothing to measure"
    counted = split.catalog.records.objects_by_label()
    segments = sum(one.segments for one in split.usable)
    crowds = sum(one.crowds for one in split.usable)
    if any(one.labels for one in split.usable):
        return None
    certain = split.complete or (counted is not None and counted.sum() == 0) or segments > crowds
    if not certain:
        return None
    if not segments:
        return split.obstacle(kind, f"no object in {len(split.inspected)} images")
    if segments == crowds:
        way = "correct 'iscrowd' in the file"
        if isinstance(split.data.dataset, DataSet):
            way += ", or set data.dataset.ignore_iscrowd=true"
        return split.obstacle(
            kind,
            f"all {crowds} objects are crowds, which are no targets: the tool that wrote them probably marks "
            f"every mask that is stored as run lengths: {way}",
        )
    return split.obstacle(
        kind,
        f"none of {segments} objects has a pixel in its image: sizes, units or ids of the masks are not "
        "those of the images",
    )


def _too_few_bits(split: _Split) -> Finding | None:
    used = [one.bits for one in split.usable if one.bits is not None]
    if split.data.bits is not None or not used or max(used) > _MOST_BITS:
        return None
    return split.obstacle(
        "16-bit images that use fewer bits",
        f"the {len(used)} files in 16 bits have no value above {2 ** max(used) - 1}, and come out dark: "
        f"their depth is probably {max(used)} bits: set data.bits={max(used)}",
    )


def _too_dark(split: _Split) -> Finding | None:
    brightest = max((one.brightest for one in split.usable), default=255)
    if brightest > _DARK or _too_few_bits(split) is not None:
        return None
    return split.obstacle(
        "images that are nearly black",
        f"no value of {len(split.usable)} images exceeds {brightest} of 255: they are probably label maps, "
        "or of another depth (data.bits)",
    )


def _too_small(split: _Split) -> Finding | None:
    if not split.training:
        return None
    cells = [area * _scale(one, split.data) / _CELL**2 for one in split.usable for area in one.areas]
    small = sum(c < 1 for c in cells)
    if small * 2 <= len(cells):
        return None
    return split.obstacle(
        "objects smaller than a cell",
        f"{small} of {len(cells)} objects cover less than a cell of {_CELL}x{_CELL} pixels of the training "
        "image: masks are predicted in cells; enlarge data.augment.size, or cut the images into tiles",
    )


def _scale(one: Inspected, data: Data) -> float:
    """Median factor between the areas of an image and of its training samples."""
    factors = []
    for draw in range(9):
        window = augment.place(*one.size, data.augment, augment.generator(0, draw, "scale")).window
        factors.append(window.scale[0] * window.scale[1])
    return float(np.median(factors))
