"""What a split as a whole cannot be used for: nothing in it to learn, or nothing to measure.

`data check` concludes from all records, a run at its start from some of them, so that what stops one stops
the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mpformer.config import Data, DataSet, LabelMaps
from mpformer.cores import usable_cores
from mpformer.data import augment
from mpformer.data.findings import Finding, Weight, in_short
from mpformer.data.inspection import Box, Inspected, inspect
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
_FLAT = 0.9
"""Share of equal neighbours from which on dark images are taken for label maps."""
_MOST_BITS = 14
"""16-bit files all of which use no more are taken to have a lower depth."""
_FEW = 3
"""Cases from which on something is concluded from most of them."""
_ALIKE = 0.5
"""IoU from which on a mask is where its box is."""
_OTHER_AREA = 1.5
"""Factor from which on an area is another."""
_LOST = 0.2
"""Share of objects without a pixel that is no accident."""


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
    rules = (
        *(_masks_elsewhere, _other_areas, _lost_pixels, _bits, _without_content, _too_small),
        *(_boxes_as_masks, _absent_classes),
    )
    return tuple(f for f in (rule(seen) for rule in rules) if f is not None)


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
            concluded = obstacles(catalog, data, name, inspected, complete)
            found = [f for f in concluded if f.weight is Weight.OBSTACLE]
            if not found or complete:
                break
            if count == _AT_START:
                found = []  # suspected only
        if found:
            raise InputError("; ".join(in_short(found)))


def not_held_out(shared: int, images: int) -> Finding | None:
    """What to say where `shared` of the validation split's images are training images, too."""
    if not shared or 2 * shared < images:
        return None
    text = f"{shared} of {images}: figures on them say nothing of other images"
    return Finding("validation images that are training images", text, Weight.NOTE, shared)


def notes_of(splits: Mapping[str, Catalog]) -> list[str]:
    """One line for each kind of what a run should say of its data before it starts."""
    lines = [f"{c.name}: {line}" for c in splits.values() for line in in_short(c.findings)]
    train, val = (splits[name].records.image_files() for name in ("train", "val"))
    if train is not None and val is not None:
        shared = not_held_out(len(set(val).intersection(train)), len(val))
        lines += in_short([shared] if shared is not None else [])
    return lines


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
    kind = "classes lost to the values to ignore"
    if not seen and pixels:
        values = ", ".join(map(str, sorted(pixels)[:5]))
        return split.obstacle(kind, f"no pixel has a class: all have ignored values ({values})")
    ids = [info.source_id for info in classes.classes]
    if _shifted(ids, {ids[label] for label in seen}, set(pixels)):
        return split.obstacle(
            kind,
            f"class {min(ids)} ('{classes.names[ids.index(min(ids))]}') never occurs, but the ignored value "
            f"{max(ids) + 1} does: the maps probably count from {min(ids) + 1}: add 1 to the ids in "
            "data.dataset.classes",
        )
    if len(seen) > 1 or not pixels:
        return None
    value, count = pixels.most_common(1)[0]
    share = 100 * count / sum(one.size[0] * one.size[1] for one in split.usable)
    if share < 1:
        return None
    lost = next(info for i, info in enumerate(classes.classes) if i not in seen)
    return split.obstacle(
        kind,
        f"of {len(classes)} classes only '{classes.names[min(seen)]}' occurs, and the ignored value {value} "
        f"covers {share:.1f} % of the pixels: it is probably the value of '{lost.name}' (now "
        f"{lost.source_id}): set that class's id to {value} in data.dataset.classes, and take {value} out of "
        "data.dataset.ignore",
    )


def _shifted(ids: Sequence[int], seen: Set[int], ignored: Set[int]) -> bool:
    """Whether the maps hold each class's id plus one: only the first is missing, and there is one beyond."""
    return len(ids) > 1 and set(ids) - seen == {min(ids)} and max(ids) + 1 in ignored


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


def _masks_elsewhere(split: _Split) -> Finding | None:
    boxes = [pair for one in split.usable for pair in one.boxes]
    if not _mostly(_iou(stated, drawn) < _ALIKE for stated, drawn in boxes):
        return None
    if not _mostly(_iou((x, y, x2 - x, y2 - y), drawn) < _ALIKE for (x, y, x2, y2), drawn in boxes):
        return None  # corners instead of sizes: the masks are right
    wrong = sum(_iou(stated, drawn) < _ALIKE for stated, drawn in boxes)
    why = "they are probably of other images, or of another size"
    if _mostly(_iou(stated, (y, x, h, w)) >= _ALIKE for stated, (x, y, w, h) in boxes):
        why = "rows and columns are exchanged: run lengths go down the columns in COCO, points are x, y"
    elif (factor := _common([drawn[2] / stated[2] for stated, drawn in boxes])) is not None:
        why = (
            f"they are {factor:.3g} times as large: probably in another unit, or of an image of another size"
        )
    return split.obstacle(
        "masks that do not lie in their boxes",
        f"{wrong} of {len(boxes)} masks are not where the annotation's 'bbox' is: {why}",
    )


def _other_areas(split: _Split) -> Finding | None:
    ratios = [ratio for one in split.usable for ratio in one.area_ratios]
    if not _mostly(abs(math.log(max(ratio, 1e-9))) > math.log(_OTHER_AREA) for ratio in ratios):
        return None
    factor = _common(ratios)
    boxes = [pair for one in split.usable for pair in one.boxes]
    if factor is None and boxes and _mostly(_iou(*pair) >= _ALIKE for pair in boxes):
        return None  # masks and boxes agree, so it is the areas that are wrong, and they are noted
    why = "run lengths that begin with a one, or points in another order or unit, look like that"
    if factor is not None:
        why = (
            f"they have {factor:.3g} times the area, as if drawn on an image {factor**0.5:.3g} times as large"
        )
    return split.obstacle(
        "masks that contradict their areas", f"most of {len(ratios)} masks do not have the area stated: {why}"
    )


def _lost_pixels(split: _Split) -> Finding | None:
    lost = sum(one.undrawn for one in split.usable)
    every = lost + sum(len(one.labels) for one in split.usable)
    if lost < _FEW or lost < _LOST * every:
        return None
    return split.obstacle(
        "objects outside their images",
        f"{lost} of {every} objects have no pixel in their image: their coordinates are probably those of "
        "images of another size",
    )


def _bits(split: _Split) -> Finding | None:
    used = [one for one in split.usable if one.bits is not None]
    if not used:
        return None
    most = max(one.bits or 0 for one in used)
    expected = max(one.expected_bits for one in used)
    if most > expected:
        return split.obstacle(
            "16-bit images that use more bits",
            f"values up to {2**most - 1} in files that are said to use {expected} bits would be white: set "
            f"data.bits={_depth(most)}",
        )
    if split.data.bits is not None or expected < 16 or most > _MOST_BITS:
        return None
    return split.obstacle(
        "16-bit images that use fewer bits",
        f"no 16-bit file ({len(used)}) has a value above {2**most - 1}, so they come out dark: set "
        f"data.bits={_depth(most)}, or the most that any split needs",
    )


def _depth(bits: int) -> int:
    """The depth of a camera whose values have so many bits."""
    return next(depth for depth in (8, 10, 12, 14, 16) if depth >= bits)


def _without_content(split: _Split) -> Finding | None:
    if split.usable and all(one.blank for one in split.usable):
        text = f"each of {len(split.usable)} images has one colour alone; transparency is not read"
        return split.obstacle("images without content", text)
    brightest = max((one.brightest for one in split.usable), default=255)
    if brightest > _DARK or _bits(split) is not None:
        return None
    if min(one.flat for one in split.usable) > _FLAT:
        text = (
            f"no value of {len(split.usable)} images exceeds {brightest} of 255: they are probably label maps"
        )
        return split.obstacle("images that are nearly black", text)
    text = f"{split.catalog.name}: hardly a value exceeds {brightest} of 255"
    return Finding("dark images", text, Weight.NOTE)


def _boxes_as_masks(split: _Split) -> Finding | None:
    drawn = [box for one in split.usable for _, box in one.boxes]
    areas = [area for one in split.usable for area in one.areas]
    if len(drawn) != len(areas) or len(areas) < _FEW:
        return None
    if any(abs(box[2] * box[3] - area) > 0.01 * area for box, area in zip(drawn, areas)):
        return None
    text = (
        f"{split.catalog.name}: each of {len(areas)} masks fills its box: boxes, not the objects' outlines?"
    )
    return Finding("masks that are boxes", text, Weight.NOTE, len(areas))


def _absent_classes(split: _Split) -> Finding | None:
    """Classes of label maps without a pixel, where that may be due to the values."""
    classes = split.catalog.classes.classes
    seen = {label for one in split.usable for label in one.labels}
    ignored = sorted({value for one in split.usable for value in one.unknown})
    absent = [info for label, info in enumerate(classes) if label not in seen]
    first = bool(absent) and absent[0].source_id == min(info.source_id for info in classes)
    if not isinstance(split.data.dataset, LabelMaps) or not absent or not (ignored or first):
        return None
    names = ", ".join(f"{info.name} ({info.source_id})" for info in absent[:5])
    why = (
        f"the ignored values {', '.join(map(str, ignored[:5]))} occur" if ignored else "do maps count from 1?"
    )
    text = f"{split.catalog.name}: {names}; {why}"
    return Finding("classes without a pixel", text, Weight.NOTE, len(absent))


def _mostly(cases: Iterable[bool]) -> bool:
    """Whether more than half of the cases are true, of a few at least."""
    listed = list(cases)
    return len(listed) >= _FEW and 2 * sum(listed) > len(listed)


def _common(factors: Sequence[float]) -> float | None:
    """The factor that most have to within a tenth, if there is one and it is not 1."""
    middle = float(np.median(factors))
    near = sum(abs(math.log(max(f, 1e-9) / middle)) < 0.1 for f in factors) if middle > 0 else 0
    return middle if 4 * near > 3 * len(factors) and abs(math.log(middle)) > 0.1 else None


def _iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = abs(a[2] * a[3]) + b[2] * b[3] - overlap
    return overlap / union if union > 0 else 0.0


def _too_small(split: _Split) -> Finding | None:
    if not split.training:
        return None
    scales = {size: _scale(size, split.data) for size in {one.size for one in split.usable}}
    cells = [area * scales[one.size] / _CELL**2 for one in split.usable for area in one.areas]
    small = sum(c < 1 for c in cells)
    if small * 2 <= len(cells):
        return None
    return split.obstacle(
        "objects smaller than a cell",
        f"{small} of {len(cells)} objects cover less than a cell of {_CELL}x{_CELL} pixels of the training "
        "image: masks are predicted in cells; enlarge data.augment.size, or cut the images into tiles",
    )


def _scale(size: tuple[int, int], data: Data) -> float:
    """Median factor between the areas of an image of (height, width) and of its training samples."""
    factors = []
    for draw in range(9):
        window = augment.place(*size, data.augment, augment.generator(0, draw, "scale")).window
        factors.append(window.scale[0] * window.scale[1])
    return float(np.median(factors))
