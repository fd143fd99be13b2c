"""Classes that a horizontal flip exchanges: their names come in pairs of left and right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpformer.config import Data
from mpformer.data.findings import Finding

_SIDES = {"left": "right", "l": "r", "lh": "rh", "lhs": "rhs", "links": "rechts", "gauche": "droite"}
"""Words of the one side, and of the other; those of four letters or more are found within others."""
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
"""The words of a name, those of leftEye and LEFT_EYE, too."""


def mirrored_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of class names that differ in the side alone, such as ("left_eye", "right_eye") or ("L hand",
    "R hand"); capitals make no difference."""
    folded = {name.casefold(): name for name in names}
    pairs = []
    for name in names:
        other = next((folded[o] for o in _other_sides(name) if o in folded and o != name.casefold()), None)
        if other is not None:
            pairs.append((name, other))
    return pairs


def _other_sides(name: str) -> list[str]:
    """What a name of the left side may be called on the right one, in lower case."""
    others = []
    for word in _WORDS.finditer(name):
        if (right := _SIDES.get(word[0].casefold())) is not None:
            others.append((name[: word.start()] + right + name[word.end() :]).casefold())
    folded = name.casefold()
    others += [
        folded.replace(left, right, 1) for left, right in _SIDES.items() if len(left) > 3 and left in folded
    ]
    return others


def mirrored(names: Sequence[str], data: Data) -> tuple[Finding, ...]:
    """A finding for each such pair, where training images are flipped; the first says what to set."""
    flip = getattr(data.augment, "flip", 0.0)
    pairs = mirrored_pairs(names) if flip else []
    why = (
        f": {flip:.0%} of the training images are flipped, which turns left into right but not the class: "
        "data.augment.flip=0 turns the flip off"
    )
    return tuple(
        Finding("classes that a flip exchanges", f"{left} and {right}{why if not index else ''}")
        for index, (left, right) in enumerate(pairs)
    )
