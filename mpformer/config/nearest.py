"""The nearest right name, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(wrong: str, names: Iterable[str], sections: bool = False) -> str:
    """The name most similar to `wrong`; with `sections`, dotted prefixes of names are candidates, too."""
    candidates = set(names)
    if sections:
        for name in list(candidates):
            parts = name.split(".")
            candidates.update(".".join(parts[:i]) for i in range(1, len(parts)))
    depth = wrong.count(".")
    last = wrong.rsplit(".", 1)[-1]

    def likeness(name: str) -> tuple[float, int, str]:
        whole = difflib.SequenceMatcher(None, wrong, name).ratio()
        end = difflib.SequenceMatcher(None, last, name.rsplit(".", 1)[-1]).ratio()
        return (whole + end, -abs(name.count(".") - depth), name)

    return max(candidates, key=likeness, default="none")
