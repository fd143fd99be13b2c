"""Training samples as a pure function of their position in the run's sample stream.

Position p stands for image `sample_order(seed, p // n)[p % n]` of the n images, augmented by a generator that
is keyed by (seed, epoch, image). Who makes the sample, where, and what came before does not enter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from mpformer.config import Data
from mpformer.data import augment
from mpformer.data.catalog import Catalog, Record
from mpformer.data.images import load_image
from mpformer.data.masks import BoxMask
from mpformer.types import InputError

_REPLACEMENTS = 100
"""Bad samples in a row after which the data set as a whole is called bad."""


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
    bits: bytes
    """The masks within their boxes, row by row, eight pixels to a byte, the leftmost in the highest bit."""
    canvas: tuple[int, int]
    """(height, width) of the padded sample."""
    skipped: str = ""
    """Why bad samples were replaced by this one; empty as a rule."""


@functools.lru_cache(maxsize=4)
def sample_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order [n] int64 in which an epoch visits the n images: a permutation, drawn anew for each epoch."""
    random = augment.generator(seed, epoch, "", "order")
    order = np.argsort(random.random(n), kind="stable")
    order.flags.writeable = False
    return order


def make_sample(catalog: Catalog, data: Data, seed: int, position: int) -> Sample:
    """The sample at a position.

    A bad one raises `InputError` that names file and annotation; under `on_bad_sample: skip` another image,
    drawn by (seed, epoch, position) alone, takes its place and the reason is noted, so no other position
    changes.
    """
    n = len(catalog)
    epoch, place = divmod(position, n)
    index = int(sample_order(seed, epoch, n)[place])
    reasons: list[str] = []
    while True:
        record = catalog.records[index]
        key = record.image_id if not reasons else f"{record.image_id}@{position}"
        try:
            return _sample(record, data, augment.generator(seed, epoch, key), position, reasons)
        except InputError as error:
            if data.on_bad_sample == "error":
                raise
            reasons.append(str(error))
        if len(reasons) == _REPLACEMENTS:
            raise InputError(
                f"{catalog.name}: {_REPLACEMENTS} bad samples in a row at position {position}; "
                f"the last: {reasons[-1]}"
            )
        random = augment.generator(seed, epoch, f"{position}/{len(reasons)}", "replace")
        index = int(random.random() * n)


def _sample(
    record: Record, data: Data, random: np.random.Generator, position: int, reasons: list[str]
) -> Sample:
    if record.problem:
        raise InputError(record.problem)
    placement = augment.place(record.height, record.width, data.augment, random)
    pixels = augment.place_image(load_image(record), placement)
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
        canvas=placement.canvas,
        skipped="; ".join(reasons),
    )


def _pack(mask: BoxMask) -> tuple[tuple[int, int, int, int], bytes]:
    """Box and bits of a mask; the box is widened to whole bytes of a canvas row."""
    height, width = mask.pixels.shape
    before = mask.x % 8
    padded = np.zeros((height, -(-(before + width) // 8) * 8), bool)
    padded[:, before : before + width] = mask.pixels
    return (mask.x - before, mask.y, padded.shape[1], height), np.packbits(padded).tobytes()
