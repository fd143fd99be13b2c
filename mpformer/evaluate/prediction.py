"""Compact predictions, a few kilobytes per image, that workers send to each other; and metrics by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpformer.draw import decode_png

LayerMetrics = dict[str, dict[int, float]]
"""Metrics of the decoder layers by name and layer: 0..1 for one image, in percent for a data set."""


@dataclass(frozen=True)
class FoundInstance:
    """One predicted object."""

    label: int
    score: float
    """0..1."""
    counts: bytes
    """The mask as COCO's compressed run lengths, at the size of the image; see `instance.decode`."""


@dataclass(frozen=True)
class FoundSegments:
    """A predicted panoptic segmentation."""

    png: bytes
    """16-bit grey PNG: 0 void, i the segment that `labels[i - 1]` and `scores[i - 1]` describe."""
    labels: tuple[int, ...]
    scores: tuple[float, ...]

    def ids(self) -> np.ndarray:
        """The segment of each pixel, [h,w] uint16."""
        return decode_png(self.png)


@dataclass(frozen=True)
class ImageLoss:
    """What one image adds to the validation loss (`mpformer.evaluate.criterion`)."""

    sums: dict[str, tuple[float, ...]]
    """By term (class, mask, dice, ...) the weighted sum at each head, not normalised yet."""
    shares: dict[str, float]
    """By term the image's share of what the sum over all images is divided by."""


@dataclass(frozen=True)
class Prediction:
    """The results for one image: one kind for an instance or semantic task, all three for a panoptic task."""

    image_id: str
    size: tuple[int, int]
    """(height, width) of the original image."""
    instances: tuple[FoundInstance, ...] | None = None
    """Sorted by score, best first."""
    panoptic: FoundSegments | None = None
    semantic: bytes | None = None
    """PNG of labels, 8 bits if they fit into 0..254, else 16; the largest value is void."""
    layers: LayerMetrics | None = None
    """Diagnostics of the decoder layers, with `evaluate.layers`."""
    loss: ImageLoss | None = None
    """With `evaluate.loss`."""
    problem: str = ""
    """Why there is no result, with `on_bad_sample: skip`; empty when there is one."""


@dataclass(frozen=True)
class Scores:
    """Metrics in percent. An undefined metric (no such class or size present) is absent."""

    summary: dict[str, float] = field(default_factory=dict)
    """{"AP": 43.7, ...}"""
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """{class name: {"AP": ..., ...}}, in the order of the class table."""

    def merged(self, other: Scores) -> Scores:
        """The union of both sets of metrics."""
        names = [*self.per_class, *(n for n in other.per_class if n not in self.per_class)]
        return Scores(
            {**self.summary, **other.summary},
            {n: {**self.per_class.get(n, {}), **other.per_class.get(n, {})} for n in names},
        )
