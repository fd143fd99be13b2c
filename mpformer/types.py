"""The shapes that travel between the parts of mpformer, and the one legend of shape letters.

Shape letters, used in every docstring of the package:

====  =======================================================================================
B     images of one (micro-)batch
Q     queries of the matching part;  P = pilot slots of one image (its groups laid end to end)
K     classes of the data set (the no-object class comes on top: K + 1 logits)
N     ground-truth objects of one image
L     decoder layers; L + 1 heads for Mask2Former: head 0 stands before layer 1
H, W  height and width of the padded network input, in pixels; h, w those of a feature level
C     channels;  M attention heads;  D channels of one head
====  =======================================================================================

Importing this module loads neither torch nor ray; tensors are only named in annotations.
"""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Task = Literal["instance", "panoptic", "semantic"]
"""The segmentation task that a model is trained for and evaluated on."""

FEATURE_STRIDES = (4, 8, 16, 32)
"""Strides of a backbone's feature levels, finest first."""
STRIDE = FEATURE_STRIDES[-1]
"""Stride of the coarsest feature level: height and width of a network input are multiples of it."""
MEMORY_STRIDES = (32, 16, 8)
"""Strides of the maps that a pixel decoder gives to the transformer decoder, coarsest first."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet's statistics that the model normalises images by, RGB, 0..255."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def encodable(text: str) -> str:
    """The text with the bytes of names that are not UTF-8 (lone surrogates in Python) as `\\xff`.

    What it returns can be written to any UTF-8 file, column or page.
    """
    return _SURROGATES.sub(_escape, text)


def printable(text: str) -> str:
    """The text on one line: `encodable`, and control characters, such as a line feed, as escapes."""
    return _CONTROL.sub(_escape, encodable(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if 0xDC80 <= code <= 0xDCFF:  # `os.fsdecode` keeps a byte that is not UTF-8 there
        return f"\\x{code - 0xDC00:02x}"
    return match.group().encode("unicode_escape").decode()


class InputError(Exception):
    """The input is wrong. The message is one line: the place, what was expected, the nearest right thing.

    The command line prints it and leaves with exit code 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(encodable(str(message)))


class RunError(Exception):
    """The run failed for a reason that the message states in one line (exit code 1)."""


@dataclass(frozen=True)
class ClassInfo:
    """One class of a data set: its name, whether it is countable, its colour and its id at the source."""

    name: str
    """On one line: what `printable` makes of it."""
    source_id: int
    is_thing: bool = True
    color: tuple[int, int, int] = (0, 0, 0)
    """RGB, 0..255."""

    def __post_init__(self) -> None:
        # it stands in tables, pages and records of runs
        object.__setattr__(self, "name", printable(str(self.name)))


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set in their contiguous order: index i of `classes` is label i everywhere."""

    classes: tuple[ClassInfo, ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise InputError("a class table without classes: at least one class is expected")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    @property
    def thing_labels(self) -> frozenset[int]:
        """Contiguous labels of the countable classes."""
        return frozenset(i for i, c in enumerate(self.classes) if c.is_thing)

    def labels_by_source_id(self) -> dict[int, int]:
        """Contiguous label of each source id."""
        return {c.source_id: i for i, c in enumerate(self.classes)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        return {
            "classes": [
                {"name": c.name, "source_id": c.source_id, "is_thing": c.is_thing, "color": list(c.color)}
                for c in self.classes
            ]
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClassTable:
        return cls(
            tuple(
                ClassInfo(c["name"], int(c["source_id"]), bool(c["is_thing"]), tuple(c["color"]))
                for c in data["classes"]
            )
        )

    @classmethod
    def numbered(cls, count: int) -> ClassTable:
        """A table of `count` things named by their number, for work without a data set."""
        return cls(tuple(ClassInfo(f"class {i}", i, True, distinct_color(i)) for i in range(count)))


def distinct_color(index: int) -> tuple[int, int, int]:
    """The index-th colour (RGB, 0..255) of an endless sequence in which neighbours differ clearly in hue."""
    hue = (index * 0.618033988749895) % 1.0  # golden-ratio steps never come close to an earlier hue soon
    value = (0.95, 0.75, 0.55)[(index // 7) % 3]
    r, g, b = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(r * 255), round(g * 255), round(b * 255)


@dataclass(frozen=True)
class Target:
    """The ground truth of one image: `labels` [N] int64 in 0..K-1, `masks` [N,H,W] bool. N may be 0."""

    labels: torch.Tensor
    masks: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            self.labels.to(device, non_blocking=non_blocking),
            self.masks.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Batch:
    """Augmented samples of one size, as the model, its losses and matching take them."""

    images: torch.Tensor
    """[B,3,H,W] uint8, RGB, 0..255; H and W multiples of 32."""
    targets: tuple[Target, ...]
    """One per image; masks at the size of `images`."""
    valid_sizes: tuple[tuple[int, int], ...]
    """(height, width) of the unpadded part of each image, its upper left corner."""
    image_ids: tuple[str, ...]
    positions: tuple[int, ...]
    """Global position of each sample in the run's sample stream: 0, 1, 2, ... over all epochs."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def nbytes(self) -> int:
        """Bytes of images and masks."""
        return self.images.nbytes + sum(target.masks.nbytes for target in self.targets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            tuple(target.to(device, non_blocking) for target in self.targets),
            self.valid_sizes,
            self.image_ids,
            self.positions,
        )

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` images, in order."""
        return [self.select(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def select(self, images: range) -> Batch:
        """The batch of some consecutive images."""
        rows = slice(images.start, images.stop)
        return Batch(
            self.images[rows],
            self.targets[rows],
            self.valid_sizes[rows],
            self.image_ids[rows],
            self.positions[rows],
        )


@dataclass(frozen=True)
class PackedTarget:
    """A `Target` on its way to the device, its masks an eighth of the bytes."""

    labels: torch.Tensor
    """[N] int64 in 0..K-1."""
    bits: torch.Tensor
    """[N,H,W/8] uint8: eight pixels of a row to a byte, the leftmost in the highest bit."""

    @property
    def masks(self) -> torch.Tensor:
        """The masks [N,H,W] bool, unpacked at each call, on the device of `bits`."""
        if self.bits.device.type == "cpu":
            import numpy as np
            import torch

            return torch.from_numpy(np.unpackbits(self.bits.numpy(), axis=2).view(bool))
        import torch

        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits.unsqueeze(3) >> shifts) & 1).bool().flatten(2)

    def pin_memory(self) -> PackedTarget:
        """A copy in pinned memory, from which copies to a GPU do not hold up the host."""
        return PackedTarget(self.labels.pin_memory(), self.bits.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """The target on a device, its masks unpacked there."""
        moved = PackedTarget(
            self.labels.to(device, non_blocking=non_blocking), self.bits.to(device, non_blocking=non_blocking)
        )
        return Target(moved.labels, moved.masks)


@dataclass(frozen=True)
class PackedBatch:
    """A `Batch` as the data part makes it, with packed masks; `to` makes the batch that the model takes."""

    images: torch.Tensor
    """[B,3,H,W] uint8, RGB, 0..255; H and W multiples of 32."""
    targets: tuple[PackedTarget, ...]
    valid_sizes: tuple[tuple[int, int], ...]
    image_ids: tuple[str, ...]
    positions: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    """One line per bad sample that `on_bad_sample: skip` replaced while this batch was made."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def nbytes(self) -> int:
        """Bytes of images and masks."""
        return self.images.nbytes + sum(target.bits.nbytes for target in self.targets)

    def pin_memory(self) -> PackedBatch:
        """A copy in pinned memory, from which copies to a GPU do not hold up the host."""
        targets = tuple(target.pin_memory() for target in self.targets)
        return replace(self, images=self.images.pin_memory(), targets=targets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device, its masks unpacked there."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            tuple(target.to(device, non_blocking) for target in self.targets),
            self.valid_sizes,
            self.image_ids,
            self.positions,
        )


@dataclass(frozen=True)
class Head:
    """The predictions of one head."""

    class_logits: torch.Tensor | None
    """[B,Q,K+1], the last entry being no-object; None for per-pixel models."""
    mask_logits: torch.Tensor
    """[B,Q,H/4,W/4]; for per-pixel models [B,K,H/4,W/4] class maps."""
    boxes: torch.Tensor | None = None
    """[B,Q,4] (centre x, centre y, width, height) in 0..1 of the padded input; None without a box head."""

    @property
    def query_classes(self) -> torch.Tensor:
        """`class_logits` of a model that classifies queries; `ValueError` for a per-pixel model."""
        if self.class_logits is None:
            raise ValueError("a head of a per-pixel model has no class logits")
        return self.class_logits

    @property
    def query_boxes(self) -> torch.Tensor:
        """`boxes` of a model that predicts them; else `ValueError`."""
        if self.boxes is None:
            raise ValueError("a head without boxes")
        return self.boxes


@dataclass(frozen=True)
class Output:
    """What a forward returns, in training and in inference alike."""

    heads: tuple[Head, ...]
    """The matching part, last head last. Only the last head in inference, unless all were asked for."""
    pilots: tuple[Head, ...] | None = None
    """The mask-piloted part, as many heads as `heads`; None without pilots."""


@dataclass(frozen=True)
class Pilots:
    """The mask-piloted part's input (MP-Former section 4): what is fed, and what it has to reconstruct."""

    labels: torch.Tensor
    """[B,P] int64: classes whose embeddings are fed as queries, with label noise; -1, which stands for a zero
    query, in padding slots."""
    objects: torch.Tensor
    """[B,P] int64: the object of its image that a slot has to reconstruct; 0 in padding slots."""
    groups: torch.Tensor
    """[B,P] int64: the slot's group within its image; -1 for padding. Padding slots of a group 0 or more are
    attended to by it and trained as no-object (released flavour)."""
    counts: tuple[int, ...]
    """Slots in use per image: the first `counts[b]` of row b; the rest is padding."""
    attention_masks: tuple[torch.Tensor | None, ...]
    """One per attention layer: [B,P,S] bool, True where the slot may attend, over the cells of the maps that
    the layer reads; None in layers that are not piloted, where a pilot attends as any query does."""
