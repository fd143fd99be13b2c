"""Training augmentation and resizing for evaluation, as pure functions of a counter-based random generator.

Every augmentation first draws a `Placement` from the image's size alone: which part is kept, at what scale,
where it lies on the canvas, mirrored or not. Only then are pixels and masks made, the kept ones only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from mpformer.config import LargeScaleJitter, TestResize
from mpformer.data.catalog import Record
from mpformer.data.masks import BoxMask, Window, crop_masks


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a training sample come from and where they go: the canvas's upper left corner."""

    window: Window
    flip: bool
    canvas: tuple[int, int]
    """(height, width) of the padded sample."""


def generator(seed: int, epoch: int, image_id: str, purpose: str = "augment") -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox keyed by their hash (Salmon et al. 2011)."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{image_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def place(height: int, width: int, config: LargeScaleJitter, random: np.random.Generator) -> Placement:
    """Draw large-scale jitter for an image of this size (Ghiasi et al., Copy-Paste, section 3).

    The image, keeping its aspect, is fitted into the target size times a uniform factor; what is then larger
    than the target is cropped at a uniform place, what is smaller is padded at the right and below. The crop
    is laid on whole pixels of the source, so that cropping before resizing is exact.
    """
    flip = random.random() < config.flip
    low, high = config.scale
    factor = low + (high - low) * random.random()
    target_height, target_width = config.size
    scale = factor * min(target_height / height, target_width / width)
    x, part_width, out_width = _crop(width, scale, target_width, random)
    y, part_height, out_height = _crop(height, scale, target_height, random)
    return Placement(Window(x, y, part_width, part_height, out_width, out_height), flip, config.size)


def _crop(size: int, scale: float, target: int, random: np.random.Generator) -> tuple[int, int, int]:
    """(start, length, length when resized) of the kept part along one axis. Draws one number in any case."""
    share = random.random()
    resized = max(1, round(size * scale))
    if resized <= target:
        return 0, size, resized
    part = min(size, max(1, round(target / scale)))
    return min(int(share * (size - part + 1)), size - part), part, target


def resize_image(image: np.ndarray, window: Window) -> np.ndarray:
    """The window of an image [h,w,3] uint8, resized: bilinear when enlarged, area means when shrunk."""
    part = image[window.y : window.y + window.height, window.x : window.x + window.width]
    if part.shape[:2] == (window.out_height, window.out_width):
        return np.ascontiguousarray(part)
    shrinks = window.out_height * window.out_width < window.height * window.width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (window.out_width, window.out_height), interpolation=how)


def place_image(image: np.ndarray, placement: Placement) -> np.ndarray:
    """The pixels [h,w,3] uint8 of an image that a placement shows, without padding."""
    pixels = resize_image(image, placement.window)
    return cv2.flip(pixels, 1) if placement.flip else pixels


def place_masks(record: Record, task: str, placement: Placement) -> Iterator[tuple[int, BoxMask]]:
    """Label and mask of each object that a placement shows, one at a time: many large ones need no room.

    Tasks "instance" and "panoptic" have one mask per segment, crowds left out; "semantic" one per class,
    crowds included, for the class of their pixels is right.
    """
    window = placement.window
    found: Iterator[tuple[int, BoxMask]]
    if task == "semantic":
        found = _by_class(record, window)
    else:
        targets = tuple(s for s in record.segments if not s.crowd)
        masks = zip(targets, crop_masks(record, targets, window))
        found = ((segment.label, mask) for segment, mask in masks if mask is not None)
    for label, mask in found:
        if placement.flip:
            mask = BoxMask(window.out_width - mask.x - mask.pixels.shape[1], mask.y, mask.pixels[:, ::-1])
        yield label, mask


def _by_class(record: Record, window: Window) -> Iterator[tuple[int, BoxMask]]:
    """One mask per class that is seen, in the order of labels."""
    maps: dict[int, np.ndarray] = {}
    for segment, mask in zip(record.segments, crop_masks(record, record.segments, window)):
        if mask is None:
            continue
        if segment.label not in maps:
            maps[segment.label] = np.zeros((window.out_height, window.out_width), bool)
        height, width = mask.pixels.shape
        maps[segment.label][mask.y : mask.y + height, mask.x : mask.x + width] |= mask.pixels
    for label in sorted(maps):
        yield label, BoxMask(0, 0, maps[label])


def test_size(height: int, width: int, config: TestResize) -> tuple[int, int]:
    """(height, width) for evaluation: the short side `short`, unless the long one would exceed `long`."""
    scale = min(config.short / min(height, width), config.long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def test_resize(image: np.ndarray, config: TestResize) -> np.ndarray:
    """An image [h,w,3] uint8 resized for evaluation; see `test_size`."""
    height, width = image.shape[:2]
    out_height, out_width = test_size(height, width, config)
    return resize_image(image, Window(0, 0, width, height, out_width, out_height))
