"""What there is to say of a data set: taken otherwise than written, left out, or in the way of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from mpformer.types import encodable

UNUSABLE = "cannot be used"
"""The kind of what is wrong with single records."""


class Weight(Enum):
    """What a finding means for a run."""

    NOTE = "the data are used all the same"
    FAULT = "stops a run, or is left out under `data.on_bad_sample: skip`"
    OBSTACLE = "stops every run: there is nothing to learn, or nothing to measure"


@dataclass(frozen=True)
class Finding:
    """One fault, or doubtful annotation, or several of one kind told by their first."""

    kind: str
    text: str
    """File, id, fault, in one line; of an obstacle also what it probably is, and what to set."""
    weight: Weight = Weight.NOTE
    count: int = 1
    """How many cases it stands for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))


@dataclass
class Notes:
    """Collects what was taken otherwise than a file has it: a count of each kind and the first case."""

    path: Path
    found: dict[str, Finding] = field(default_factory=dict)

    def add(self, kind: str, text: str) -> None:
        """Count one case; the text of the first is kept."""
        known = self.found.get(kind)
        count = known.count + 1 if known is not None else 1
        text = known.text if known is not None else f"{self.path}: {text}"
        self.found[kind] = Finding(kind, text, Weight.NOTE, count)

    def findings(self) -> tuple[Finding, ...]:
        return tuple(self.found.values())


def in_short(findings: Iterable[Finding]) -> list[str]:
    """One line for each kind: how many, and the first."""
    first: dict[str, Finding] = {}
    counts: Counter[str] = Counter()
    for finding in findings:
        first.setdefault(finding.kind, finding)
        counts[finding.kind] += finding.count
    return [
        f"{kind}: {counts[kind]}, the first: {f.text}" if counts[kind] > 1 else f"{kind}: {f.text}"
        for kind, f in first.items()
    ]
