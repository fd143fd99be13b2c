"""The ground truth of one image in the forms that metrics compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mpformer.data.augment import Placement, place_masks
from mpformer.data.masks import Window, record_masks, segment_rle
from mpformer.data.records import MapId, Record
from mpformer.evaluate.instance import TrueInstance, area, encode_mask
from mpformer.evaluate.postprocess import Sizes
from mpformer.types import ClassTable, Target, Task

VOID = -1
"""Label of pixels that no segment covers."""


class Truth:
    """The ground truth of one image. Each form is computed at its first use."""

    def __init__(self, record: Record, classes: ClassTable, instances: Record | None = None) -> None:
        self.record = record
        self.classes = classes
        self._instances = record if instances is None else instances

    @cached_property
    def instances(self) -> tuple[TrueInstance, ...]:
        """The objects and crowd regions: `Catalog.instances` where the data set has it, else the segments."""
        return true_instances(self._instances)

    @cached_property
    def segments(self) -> TrueSegments:
        """The panoptic segmentation."""
        return true_segments(self.record)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each pixel, [h,w] int64; `VOID` where there is none."""
        return self.segments.semantic()


@dataclass(frozen=True)
class TrueSegments:
    """A panoptic segmentation: `ids` [h,w] int32, 0 void, i the segment of `labels[i - 1]`."""

    ids: np.ndarray
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]

    def semantic(self) -> np.ndarray:
        """The label of each pixel, [h,w] int64; `VOID` where there is none. Crowd regions count."""
        return np.array([VOID, *self.labels], dtype=np.int64)[self.ids]


def true_instances(record: Record) -> tuple[TrueInstance, ...]:
    """Every segment as an instance, with its annotated area."""
    if any(isinstance(s.mask, MapId) for s in record.segments):  # decodes the label map once for all
        counts = [encode_mask(mask) for mask in record_masks(record)]
    else:
        counts = [segment_rle(s, record)["counts"] for s in record.segments]
    size = record.height, record.width
    return tuple(
        TrueInstance(s.label, s.crowd, c, s.area if s.area > 0 else float(area(c, size)))
        for s, c in zip(record.segments, counts)
    )


def true_segments(record: Record) -> TrueSegments:
    """The record as a panoptic segmentation; where segments overlap, the later one is on top."""
    ids = np.zeros((record.height, record.width), dtype=np.int32)
    for i, mask in enumerate(record_masks(record)):
        ids[mask] = i + 1
    return TrueSegments(ids, tuple(s.label for s in record.segments), tuple(s.crowd for s in record.segments))


def target_of(record: Record, sizes: Sizes, task: Task) -> Target:
    """The record as a training target at the size of the network input; masks are False in the padding.

    Crowd regions are left out, except for the task "semantic", which has one mask per class.
    """
    window = Window(0, 0, record.width, record.height, sizes.valid[1], sizes.valid[0])
    found = list(place_masks(record, task, Placement(window)))
    masks = torch.zeros(len(found), *sizes.padded, dtype=torch.bool)
    for mask, (_, box) in zip(masks, found):
        h, w = box.pixels.shape
        mask[box.y : box.y + h, box.x : box.x + w] = torch.from_numpy(np.ascontiguousarray(box.pixels))
    return Target(torch.tensor([label for label, _ in found], dtype=torch.int64), masks)
