"""What the values of a label map probably are where some are neither classes nor to be ignored."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from mpformer.config import LabelMaps

_SHOWN = 5
_WHITE = 255
"""What programs write for the one object of a binary map, and for pixels without a class."""
_HIGHEST = (255, 65535)
"""Over which a map that is to be looked at is spread, of 8 and 16 bits."""
_DEPTHS = (257, 256)
"""By which programs multiply 8 bits to get 16."""
_LEAST_OF_ONE = 50
"""A single value is a multiple of some class id by chance, the more so the smaller the factor."""
_LEAST_ROUNDED = 10
"""So are several if multiples are rounded."""


def listed(numbers: Sequence[int], noun: str) -> str:
    """Numbers in words: "the value 3", "the values 3, 4", "9 values (0, 1, 2, 3, 4, ...)"."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    if len(numbers) == 1:
        return f"the {noun} {shown}"
    return f"the {noun}s {shown}" if len(numbers) <= _SHOWN else f"{len(numbers)} {noun}s ({shown}, ...)"


def unknown_values(unknown: Sequence[int], values: Sequence[int], dataset: LabelMaps) -> str:
    """One line on the unknown ones among all values of a map, both ascending, and what they probably are."""
    if len(unknown) == 1:
        found = f"the value {unknown[0]} is neither a class nor among those to ignore"
    else:
        found = f"{listed(unknown, 'value')} are neither classes nor among those to ignore"
    guess = _guess(unknown, values, dataset) if dataset.encoding == "classes" else ""
    return f"{found}; {guess}" if guess else found


def _guess(unknown: Sequence[int], values: Sequence[int], dataset: LabelMaps) -> str:
    """What the values of a map of classes probably are; "" where nothing suggests itself."""
    names = {entry.id: entry.name for entry in dataset.classes}
    ignored = () if dataset.ignore == "others" else dataset.ignore
    if unknown[0] == unknown[-1] == _WHITE:
        absent = [name for number, name in names.items() if number not in values]
        if len(absent) == 1:
            other = "" if len(names) <= 2 else ", or a value to ignore (`data.dataset.ignore=[255]`)"
            return f"255 is probably '{absent[0]}'{other}: write its id, or give the class the id 255"
    if len(unknown) == 1 and unknown[0] in (0, _WHITE):
        return (
            f"{unknown[0]} often stands for pixels without a class: then `data.dataset.ignore=[{unknown[0]}]`"
        )
    if (factor := _factor(values, names, ignored)) is not None:
        rounded = ", rounded" if factor % 1 else ""
        return (
            f"the values are probably class ids times {factor:g}{rounded}: divide them by {factor:g}, or "
            "give the classes those ids"
        )
    if (encoding := _encoding(values, {*names, *ignored})) is not None:
        return f"they are probably classes and numbers of objects: `data.dataset.encoding={encoding}`"
    if list(unknown) == [max(names) + 1] and 0 in names and 0 not in values:
        return "no pixel is 0: the values are probably class ids plus 1: add 1 to the ids of the classes"
    if len(values) > 2 * len(names):
        between = sum(min(names) < value < max(names) for value in unknown)
        resized = "a map that was saved as JPEG or resized smoothly"
        if 2 * between > len(unknown):
            return f"so many values are as of {resized}: make it anew, as a PNG, resized by nearest neighbour"
        return f"so many values are as of a picture, of numbers of objects, or of {resized}"
    return ""


def _factor(values: Sequence[int], classes: Collection[int], ignored: Collection[int]) -> float | None:
    """By what the ids of the classes are multiplied in a map, if they are."""
    whole = [value for value in values if value]
    present = [value for value in whole if value not in ignored]
    if not present or any(value in classes for value in present) or max(classes) < 1:
        return None
    candidates: list[float] = []
    for highest in _HIGHEST:
        candidates += [highest // max(classes), highest / max(classes)]
    candidates += _DEPTHS
    least = _LEAST_OF_ONE if len(present) == 1 else 2
    if len(present) > 1:
        candidates += [present[0] // c for c in sorted(classes) if c and not present[0] % c]
    for explained in (whole, present):  # what is ignored may be as it was, beside what is multiplied
        for factor in candidates:
            if factor < (least if factor % 1 == 0 else max(least, _LEAST_ROUNDED)):
                continue
            scaled = [number * factor for number in {*classes, *ignored}]
            if {*explained} <= {*map(math.floor, scaled), *map(math.ceil, scaled)}:
                return factor
    return None


def _encoding(values: Sequence[int], known: Collection[int]) -> str | None:
    """The encoding of separate objects that makes classes of all values, if some values need one."""
    if values[-1] >= 1000 and all((v if v < 1000 else v // 1000) in known for v in values):
        return "cityscapes_instances"
    if values[-1] >= 256 and all(v >> 8 in known for v in values):
        return "mapillary_instances"
    return None
