"""Training augmentation and resizing for evaluation, as pure functions of a counter-based random generator.

Every augmentation first draws a `Placement` from the image's size alone: which part is kept, at what scale,
mirrored or not. Only then are pixels and masks made, and only those that are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cv2
import numpy as np

from mpformer import plugin
from mpformer.config import LargeScaleJitter, Plugin, ShortEdgeJitter, ShortestEdge, TestResize
from mpformer.config.data import AnyAugment
from mpformer.config.section import Section
from mpformer.data.colors import draw_colors
from mpformer.data.masks import BoxMask, Window, crop_masks
from mpformer.data.records import Record
from mpformer.types import STRIDE, InputError

_BLOCK = 8
"""Pixels along a side of a JPEG block."""


@dataclass(frozen=True)
class Placement:
    """How a training sample is made from its image; it fills the canvas from the upper left corner."""

    window: Window
    """The part of the image that is kept, and the size that it is resized to."""
    flip: bool = False
    """Mirrored from left to right after that."""
    colors: Callable[[np.ndarray], np.ndarray] | None = None
    """Changes the resized pixels, [h,w,3] uint8 RGB, and not their size; draws no random numbers any more."""
    max_category_area: float = 1.0
    """Largest share of the labelled pixels that one class may have, 0..1: otherwise the crop is drawn again,
    up to ten times."""


class Augmentation(Protocol):
    """The contract of `data.augment.kind`: where a training sample comes from in its image.

    A sample is a function of (seed, epoch, image), in whichever process it is made: an augmentation keeps no
    state, and draws all its random numbers from the generator that it is given.
    """

    def canvas(self) -> tuple[int, int] | None:
        """(height, width) that all samples are padded to, multiples of 32. None: those of a global batch are
        padded to the largest among them."""

    def place(self, height: int, width: int, random: np.random.Generator) -> Placement:
        """Draw the placement of an image of that size in pixels. Its result fits into the canvas."""


def augmentation(config: AnyAugment) -> Augmentation:
    """The augmentation that the settings name; `InputError` for a plug-in that does not fit its contract."""
    if isinstance(config, Plugin):
        own = plugin.shared(config.kind, config.options, Augmentation, "data.augment")
        _check_canvas(own.canvas(), f"data.augment: {config.kind}")
        return own
    return _KINDS[type(config)](config)


def _check_canvas(canvas: object, what: str) -> None:
    sides = canvas if isinstance(canvas, tuple) and len(canvas) == 2 else (0,)
    if canvas is not None and not all(
        type(side) is int and side > 0 and side % STRIDE == 0 for side in sides
    ):
        raise InputError(
            f"{what}: canvas {canvas}: None or (height, width), multiples of {STRIDE}, is expected"
        )


def place(height: int, width: int, config: AnyAugment, random: np.random.Generator) -> Placement:
    """Draw the augmentation of an image of this size in pixels.

    Raises `InputError` where a plug-in's placement fits neither the image nor its own canvas.
    """
    chosen = augmentation(config)
    placement = chosen.place(height, width, random)
    if isinstance(config, Plugin):
        _check_placement(placement, height, width, chosen.canvas(), f"data.augment: {config.kind}")
    return placement


def _check_placement(
    placement: Placement, height: int, width: int, canvas: tuple[int, int] | None, what: str
) -> None:
    if not isinstance(placement, Placement):
        raise InputError(f"{what}: a Placement is expected, not {placement!r}")
    w = placement.window
    inside = 0 <= w.x < w.x + w.width <= width and 0 <= w.y < w.y + w.height <= height
    if not inside:
        raise InputError(f"{what}: {w} lies outside of the {width}x{height} image")
    most_height, most_width = canvas if canvas is not None else (w.out_height, w.out_width)
    if not (0 < w.out_width <= most_width and 0 < w.out_height <= most_height):
        raise InputError(f"{what}: {w} exceeds the canvas of {most_width}x{most_height} pixels")


def generator(seed: int, epoch: int, image_id: str, purpose: str = "augment") -> np.random.Generator:
    """A generator that depends on its arguments alone: Philox keyed by their hash (Salmon et al. 2011)."""
    key = hashlib.blake2b(
        f"{seed}/{epoch}/{purpose}/{image_id}".encode(errors="surrogateescape"), digest_size=16
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


# Crops are laid on whole pixels of the source, so cropping before resizing is exact, and masks are those of
# the very same pixels.


@dataclass(frozen=True)
class _LargeScaleJitter:
    """Ghiasi et al., Copy-Paste, section 3: the image is fitted into the target size times a factor."""

    config: LargeScaleJitter

    def canvas(self) -> tuple[int, int]:
        return self.config.size

    def place(self, height: int, width: int, random: np.random.Generator) -> Placement:
        config = self.config
        flip = random.random() < config.flip
        low, high = config.scale
        factor = low + (high - low) * random.random()
        scale = factor * min(config.size[0] / height, config.size[1] / width)
        return Placement(_fixed_crop(height, width, scale, config.size, random), flip)


@dataclass(frozen=True)
class _ShortEdgeJitter:
    config: ShortEdgeJitter

    def canvas(self) -> tuple[int, int]:
        return self.config.size

    def place(self, height: int, width: int, random: np.random.Generator) -> Placement:
        config = self.config
        flip = random.random() < config.flip
        low, high = config.scale
        share = random.random()
        if config.steps is not None:
            share = int(share * config.steps) / (config.steps - 1)
        short = int(config.short * (low + (high - low) * share))
        scale = min(short / min(height, width), config.long / max(height, width))
        colors = draw_colors(random) if config.colors else None
        window = _fixed_crop(height, width, scale, config.size, random)
        return Placement(window, flip, colors, config.max_category_area)


@dataclass(frozen=True)
class _ShortestEdge:
    """Carion et al., DETR, appendix A.4, where `crop` is 0.5; plain scale augmentation where it is 0."""

    config: ShortestEdge

    def canvas(self) -> None:
        return None

    def place(self, height: int, width: int, random: np.random.Generator) -> Placement:
        config = self.config
        flip, crops = random.random() < config.flip, random.random() < config.crop
        short = config.shorts[int(random.random() * len(config.shorts))]
        x, y, part_width, part_height = 0, 0, width, height
        if crops:
            first = config.crop_shorts[int(random.random() * len(config.crop_shorts))]
            scale = first / min(height, width)
            x, part_width = _crop_between(width, scale, config.crop_size, random)
            y, part_height = _crop_between(height, scale, config.crop_size, random)
        out_height, out_width = _fitted(part_height, part_width, short, config.long)
        return Placement(Window(x, y, part_width, part_height, out_width, out_height), flip)


_KINDS: dict[type[Section], Callable[[Any], Augmentation]] = {
    LargeScaleJitter: _LargeScaleJitter,
    ShortEdgeJitter: _ShortEdgeJitter,
    ShortestEdge: _ShortestEdge,
}
"""The augmentation of each section of `data.augment`."""


def _fixed_crop(
    height: int, width: int, scale: float, size: tuple[int, int], random: np.random.Generator
) -> Window:
    """The whole image at that scale, or where it exceeds `size` (height, width) a crop anywhere in it."""
    x, part_width, out_width = _crop(width, scale, size[1], random)
    y, part_height, out_height = _crop(height, scale, size[0], random)
    return Window(x, y, part_width, part_height, out_width, out_height)


def _crop(size: int, scale: float, target: int, random: np.random.Generator) -> tuple[int, int, int]:
    """(start, length, length when resized) of the kept part along one axis. Draws one number in any case."""
    share = random.random()
    if scale <= 0.5:  # whole blocks of the JPEG, so that it can be decoded smaller: the last 7 pixels may go
        size = max(_BLOCK, size - size % _BLOCK) if size > _BLOCK else size
    resized = max(1, round(size * scale))
    if resized <= target:
        return 0, size, resized
    part = min(size, max(1, round(target / scale)))
    if scale <= 0.5 and part > _BLOCK:
        part = min(size, round(part / _BLOCK) * _BLOCK)
    return _start(share, size - part, scale), part, target


def _start(share: float, room: int, scale: float) -> int:
    start = min(int(share * (room + 1)), room)
    return start - start % _BLOCK if scale <= 0.5 else start


def moved(placement: Placement, height: int, width: int, random: np.random.Generator) -> Placement:
    """The same placement with its crop elsewhere in the image."""
    w = placement.window
    x = _start(random.random(), width - w.width, w.scale[0])
    y = _start(random.random(), height - w.height, w.scale[1])
    return replace(placement, window=replace(w, x=x, y=y))


def cut(placement: Placement, height: int, width: int) -> Placement:
    """The placement without what would lie beyond a canvas of that size."""
    w = placement.window
    out_height, out_width = min(w.out_height, height), min(w.out_width, width)
    part_height = max(1, round(w.height * out_height / w.out_height))
    part_width = max(1, round(w.width * out_width / w.out_width))
    return replace(placement, window=Window(w.x, w.y, part_width, part_height, out_width, out_height))


def _crop_between(
    size: int, scale: float, limits: tuple[int, int], random: np.random.Generator
) -> tuple[int, int]:
    """(start, length) in the source of a crop whose length is uniform between the limits when resized."""
    resized = max(1, round(size * scale))
    low, high = (min(resized, limit) for limit in limits)
    length = low + min(int(random.random() * (high - low + 1)), high - low)
    part = min(size, max(1, round(length / scale)))
    return _start(random.random(), size - part, 1.0), part


def resize_image(image: np.ndarray, window: Window) -> np.ndarray:
    """The window of an image [h,w,3] uint8, resized: bilinear when enlarged, area means when shrunk."""
    part = image[window.y : window.y + window.height, window.x : window.x + window.width]
    if part.shape[:2] == (window.out_height, window.out_width):
        return np.ascontiguousarray(part)
    shrinks = window.out_height * window.out_width < window.height * window.width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (window.out_width, window.out_height), interpolation=how)


def reduction(window: Window) -> int:
    """By which factor (1, 2 or 4) an image may be decoded smaller and still be shrunk to the window."""
    for factor in (4, 2):
        large = window.width >= factor * window.out_width and window.height >= factor * window.out_height
        if large and not any(n % factor for n in (window.x, window.y, window.width, window.height)):
            return factor
    return 1


def place_image(image: np.ndarray, placement: Placement, reduced: int = 1) -> np.ndarray:
    """The pixels [h,w,3] uint8 of an image that a placement shows, without padding.

    `reduced`: the factor by which the image was decoded smaller.
    """
    window = placement.window
    if reduced > 1:
        x, y, width, height = (n // reduced for n in (window.x, window.y, window.width, window.height))
        window = Window(x, y, width, height, window.out_width, window.out_height)
    pixels = resize_image(image, window)
    if placement.colors is not None:
        pixels = placement.colors(pixels)
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
    """(height, width) for evaluation, see `TestResize`."""
    if config.short is None:
        scale = 1.0 if config.long is None else config.long / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    return _fitted(height, width, config.short, config.long)


def _fitted(height: int, width: int, short: int, long: int | None) -> tuple[int, int]:
    """(height, width) with the short side `short`, unless the long one would exceed `long`."""
    scale = short / min(height, width)
    if long is not None:
        scale = min(scale, long / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def test_resize(image: np.ndarray, config: TestResize) -> np.ndarray:
    """An image [h,w,3] uint8 resized for evaluation; see `TestResize`."""
    height, width = image.shape[:2]
    out_height, out_width = test_size(height, width, config)
    return resize_image(image, Window(0, 0, width, height, out_width, out_height))
