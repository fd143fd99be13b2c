"""The ground truth of one record in the forms that the metrics compare with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mpformer.data.augment import Placement, place_masks
from mpformer.data.masks import Window, record_masks, segment_rle
from mpformer.data.records import MapId, Record
from mpformer.evaluate.instance import TrueInstance, encode_mask
from mpformer.evaluate.postprocess import Sizes
from mpformer.types import Target, Task

VOID = -1
"""Label of pixels that no segment covers."""


@dataclass(frozen=True)
class TrueSegments:
    """A partition of the image: `ids` [h,w] int32, 0 void, i the segment of `labels[i - 1]`."""

    ids: np.ndarray
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]

    def semantic(self) -> np.ndarray:
        """The label of each pixel, [h,w] int64; `VOID` where there is none. Crowds have their class."""
        return np.array([VOID, *self.labels], dtype=np.int64)[self.ids]


def true_instances(record: Record) -> tuple[TrueInstance, ...]:
    """Every segment as an instance, with the area that its source states."""
    if any(isinstance(s.mask, MapId) for s in record.segments):  # one reading of the label map for all
        counts = [encode_mask(mask) for mask in record_masks(record)]
    else:
        counts = [segment_rle(s, record)["counts"] for s in record.segments]
    return tuple(TrueInstance(s.label, s.crowd, c, s.area) for s, c in zip(record.segments, counts))


def true_segments(record: Record) -> TrueSegments:
    """The record as a partition; where segments overlap, the later one is on top."""
    ids = np.zeros((record.height, record.width), dtype=np.int32)
    for i, mask in enumerate(record_masks(record)):
        ids[mask] = i + 1
    return TrueSegments(ids, tuple(s.label for s in record.segments), tuple(s.crowd for s in record.segments))


def target_of(record: Record, sizes: Sizes, task: Task) -> Target:
    """The record as a training target at the size of the network input, padding empty: what a loss would see.

    Crowds are left out but for the task "semantic", which has one mask per class.
    """
    window = Window(0, 0, record.width, record.height, sizes.valid[1], sizes.valid[0])
    found = list(place_masks(record, task, Placement(window, flip=False, canvas=sizes.padded)))
    masks = torch.zeros(len(found), *sizes.padded, dtype=torch.bool)
    for mask, (_, box) in zip(masks, found):
        h, w = box.pixels.shape
        mask[box.y : box.y + h, box.x : box.x + w] = torch.from_numpy(np.ascontiguousarray(box.pixels))
    return Target(torch.tensor([label for label, _ in found], dtype=torch.int64), masks)
