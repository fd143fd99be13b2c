"""Training samples as a pure function of their position in the run's sample stream.

Position p stands for image `sample_order(seed, p // n)[p % n]` of the n images, augmented by a generator that
is keyed by (seed, epoch, image). Who makes the sample, where, and what came before does not enter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mpformer.config import Data
from mpformer.data import augment
from mpformer.data.augment import Placement
from mpformer.data.images import load_reduced_image
from mpformer.data.masks import BoxMask
from mpformer.data.records import Catalog, Record
from mpformer.types import STRIDE, InputError, round_up

_REPLACEMENTS = 100
"""Bad samples in a row after which the data set as a whole is called bad."""
_GROUPS_MIXED = 4
"""Groups of packed images that are mixed with each other."""
_UNKNOWN_SIZE = (640, 640)
"""(height, width) that an image is taken to have if its own cannot be read."""
_CROPS = 10
"""Crops tried for one in which no class has more than its share (detectron2's count)."""


@dataclass(frozen=True)
class Sample:
    """One augmented sample: masks as bits within their boxes, the image without its padding."""

    position: int
    image_id: str
    image: np.ndarray
    """[3,h,w] uint8 RGB: the part of the canvas that is no padding, its upper left corner."""
    labels: np.ndarray
    """[N] int32."""
    boxes: np.ndarray
    """[N,4] int32: x, y, width, height of each mask's box on the canvas; x and width are multiples of 8."""
    bits: bytes | memoryview
    """The masks within their boxes, row by row, eight pixels to a byte, the leftmost in the highest bit."""
    skipped: str = ""
    """Why bad samples were replaced by this one; empty as a rule."""


@functools.lru_cache(maxsize=4)
def sample_order(seed: int, epoch: int, n: int, group: int = 1) -> np.ndarray:
    """The order [n] int64 in which an epoch visits the n images: a permutation, drawn anew for each epoch.

    Where neighbours are read together in groups of `group`, the groups are permuted, then the images of each
    run of four groups: so few groups are in use at a time.
    """
    random = augment.generator(seed, epoch, "", "order")
    if group == 1:
        order = np.argsort(random.random(n), kind="stable")
    else:
        groups = np.argsort(random.random(-(-n // group)), kind="stable")
        order = (groups[:, None] * group + np.arange(group)).ravel()
        order = order[order < n]
        window = np.arange(n) // (_GROUPS_MIXED * group)
        order = order[np.lexsort((random.random(n), window))]
    order.flags.writeable = False
    return order


def batch_canvas(catalog: Catalog, data: Data, seed: int, batch_size: int, position: int) -> tuple[int, int]:
    """(height, width) of the padded images in the global batch that a position belongs to.

    The augmentation's canvas; where it has none, the batch's largest sample, rounded up to multiples of 32.
    Placements follow from the sizes of images, so no pixel is read for it.
    """
    if (fixed := augment.augmentation(data.augment).canvas()) is not None:
        return fixed
    start = position - position % batch_size
    sizes = [_planned_size(catalog, data, seed, p) for p in range(start, start + batch_size)]
    height, width = (max(side) for side in zip(*sizes))
    return round_up(height, STRIDE), round_up(width, STRIDE)


def _planned_size(catalog: Catalog, data: Data, seed: int, position: int) -> tuple[int, int]:
    """(height, width) of the sample at a position if its image can be used."""
    epoch, place = divmod(position, len(catalog))
    record = catalog.records[int(sample_order(seed, epoch, len(catalog), catalog.group)[place])]
    height, width = (record.height, record.width) if record.width else _UNKNOWN_SIZE
    random = augment.generator(seed, epoch, record.image_id)
    window = augment.place(height, width, data.augment, random).window
    return window.out_height, window.out_width


def make_sample(catalog: Catalog, data: Data, seed: int, position: int) -> Sample:
    """The sample at a position.

    A bad one raises `InputError` that names file and annotation; under `on_bad_sample: skip` another image,
    drawn by (seed, epoch, position) alone, takes its place, the reason is noted: no other position changes.
    """
    n = len(catalog)
    epoch, place = divmod(position, n)
    record = catalog.records[int(sample_order(seed, epoch, n, catalog.group)[place])]
    random = augment.generator(seed, epoch, record.image_id)
    try:
        return _sample(record, data, random, position)
    except InputError as error:
        if data.on_bad_sample == "error":
            raise
        reasons = [str(error)]
    # where the batch decides on the canvas, it was decided without the replacement
    fixed = augment.augmentation(data.augment).canvas() is not None
    room = None if fixed else _planned_size(catalog, data, seed, position)
    while len(reasons) < _REPLACEMENTS:
        random = augment.generator(seed, epoch, f"{position}/{len(reasons)}", "replace")
        record = catalog.records[int(random.random() * n)]
        try:
            return _sample(record, data, random, position, reasons, room)
        except InputError as error:
            reasons.append(str(error))
    raise InputError(
        f"{catalog.name}: {_REPLACEMENTS} bad samples in a row at position {position}; "
        f"the last: {reasons[-1]}"
    )


def _sample(
    record: Record,
    data: Data,
    random: np.random.Generator,
    position: int,
    reasons: Sequence[str] = (),
    room: tuple[int, int] | None = None,
) -> Sample:
    if record.problem:
        raise InputError(record.problem)
    placement = augment.place(record.height, record.width, data.augment, random)
    if room is not None:
        placement = augment.cut(placement, *room)
    if placement.max_category_area < 1.0:
        placement = _mixed(record, placement, random)
    reduced = augment.reduction(placement.window)
    image, reduced = load_reduced_image(record, reduced)
    pixels = augment.place_image(image, placement, reduced)
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, list(planes))
    labels, boxes, bits = [], [], []
    for label, mask in augment.place_masks(record, data.task, placement):
        box, packed = _pack(mask)
        labels.append(label)
        boxes.append(box)
        bits.append(packed)
    return Sample(
        position=position,
        image_id=record.image_id,
        image=planes,
        labels=np.array(labels, np.int32),
        boxes=np.array(boxes, np.int32).reshape(-1, 4),
        bits=b"".join(bits),
        skipped="; ".join(reasons),
    )


def _mixed(record: Record, placement: Placement, random: np.random.Generator) -> Placement:
    """The placement with its crop, or the first of ten others, in which no class exceeds its share."""
    limit = placement.max_category_area
    for _ in range(_CROPS):
        areas = [int(m.pixels.sum()) for _, m in augment.place_masks(record, "semantic", placement)]
        if len(areas) > 1 and max(areas) < limit * sum(areas):
            break
        placement = augment.moved(placement, record.height, record.width, random)
    return placement


def _pack(mask: BoxMask) -> tuple[tuple[int, int, int, int], bytes]:
    """Box and bits of a mask; the box is widened to whole bytes of a canvas row."""
    height, width = mask.pixels.shape
    before = mask.x % 8
    padded = np.zeros((height, round_up(before + width, 8)), bool)
    padded[:, before : before + width] = mask.pixels
    return (mask.x - before, mask.y, padded.shape[1], height), np.packbits(padded).tobytes()
