"""What is kept of a prediction: a few kilobytes per image, ready to travel between workers."""

from __future__ import annotations

from dataclasses import dataclass, field

Figures = dict[str, dict[int, float]]
"""Figures of decoder layers by name and layer: 0..1 of one image, in percent of a data set."""


@dataclass(frozen=True)
class FoundInstance:
    """One predicted object."""

    label: int
    score: float
    """0..1."""
    counts: bytes
    """The mask as COCO's compressed run lengths, at the size of the image."""


@dataclass(frozen=True)
class FoundSegments:
    """One predicted partition into segments."""

    png: bytes
    """16-bit grey PNG: 0 void, i the segment that `labels[i - 1]` and `scores[i - 1]` describe."""
    labels: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """All that an evaluation needs of one image; a part that the task does not ask for is None."""

    image_id: str
    size: tuple[int, int]
    """(height, width) of the original image."""
    instances: tuple[FoundInstance, ...] | None = None
    """Best first."""
    panoptic: FoundSegments | None = None
    semantic: bytes | None = None
    """PNG of labels, 8 bits if they fit into 0..254, else 16; the largest value is void."""
    layers: Figures | None = None
    """Diagnostics of the decoder's layers, under `evaluate.layers`."""
    problem: str = ""
    """Why there is no prediction, under `on_bad_sample: skip`; empty when there is one."""


@dataclass(frozen=True)
class Scores:
    """Figures in percent. A figure that is not defined (no such class or size present) is absent."""

    summary: dict[str, float] = field(default_factory=dict)
    """{"AP": 43.7, ...}"""
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """{class name: {"AP": ..., ...}}, classes in the order of the table."""

    def merged(self, other: Scores) -> Scores:
        """Both sets of figures together."""
        names = [*self.per_class, *(n for n in other.per_class if n not in self.per_class)]
        return Scores(
            {**self.summary, **other.summary},
            {n: {**self.per_class.get(n, {}), **other.per_class.get(n, {})} for n in names},
        )
