"""Noise on the ground-truth masks and labels that pilots are given (MP-Former sections 4.3 and 4.4).

Masks are [n,h,w] bool at a layer's own level; distances and areas count its cells. A kind of noise is a
class that draws random numbers and calls a deterministic function with them. What the released code does
differently has classes and functions of its own, named `Released...` and `released_...`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpformer import plugin
from mpformer.config import model as settings
from mpformer.config.model import Pilot, PilotRules
from mpformer.config.plugins import Plugin
from mpformer.model.streams import Draws


class Noise(Protocol):
    """The contract of a kind of noise, which `model.pilot.noise` names."""

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        """The masks [n,h,w] bool of all pilots of a micro-batch with noise, another tensor of that shape and
        dtype.

        Random numbers come from `draws.uniform(*shape)`: [n,*shape] float32 in [0, 1), new ones at each call.
        Those of a pilot do not depend on the others; neither may its noise. Called once for each map that a
        piloted layer reads.
        """


class NoiseAtOnce(Protocol):
    """Noise of the released code that is drawn once, at stride 8, and resized for all layers."""

    def __call__(self, masks: Tensor, boxes: Tensor, draws: Draws) -> Tensor:
        """As `Noise`; boxes [n,4] of the masks at full size, (centre x, centre y, width, height) in 0..1."""


@dataclass(frozen=True)
class PilotNoise:
    """All noise of `model.pilot`, in order."""

    at_once: tuple[NoiseAtOnce, ...]
    at_each_layer: tuple[Noise, ...]
    """Applied after `at_once`."""


def build_noise(pilot: Pilot) -> PilotNoise:
    """The noise of the settings. Raises `InputError` for a plug-in that does not keep the contract."""
    rules = pilot.rules()
    at_once: list[NoiseAtOnce] = []
    at_each_layer: list[Noise] = []
    for noise in pilot.noise:
        if isinstance(noise, Plugin):
            at_each_layer.append(plugin.shared(noise.kind, noise.options, Noise, "model.pilot.noise"))
        elif isinstance(noise, settings.ShiftNoise) and rules.shift == "released":
            at_once.append(ReleasedShift(noise))
        elif isinstance(noise, settings.ScaleNoise) and rules.scale == "released":
            at_once.append(ReleasedScale(noise))
        else:
            at_each_layer.append(NOISES[noise.kind](noise, rules))
    return PilotNoise(tuple(at_once), tuple(at_each_layer))


class NoNoise:
    """The ground truth as it is."""

    def __init__(self, noise: settings.NoNoise, rules: PilotRules) -> None:
        pass

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        return masks


class PointNoise:
    def __init__(self, noise: settings.PointNoise, rules: PilotRules) -> None:
        self.ratio, self.independent = noise.ratio, rules.point_flips == "independent"

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        scores = draws.uniform(masks.shape[1] * masks.shape[2])
        if self.independent:
            return released_point_noise(masks, self.ratio, scores)
        return point_noise(masks, self.ratio, scores, draws.uniform())


class ShiftNoise:
    def __init__(self, noise: settings.ShiftNoise, rules: PilotRules) -> None:
        self.ratio = noise.ratio

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        return shift_noise(masks, self.ratio, draws.uniform(2))


class ScaleNoise:
    def __init__(self, noise: settings.ScaleNoise, rules: PilotRules) -> None:
        self.ratio = noise.ratio

    def __call__(self, masks: Tensor, draws: Draws) -> Tensor:
        return scale_noise(masks, self.ratio, draws.uniform())


NOISES: dict[str, Callable[[Any, PilotRules], Noise]] = {
    "none": NoNoise,
    "point": PointNoise,
    "shift": ShiftNoise,
    "scale": ScaleNoise,
}
"""By the kind of a noise's section in `config.model`, from which it is made."""


class ReleasedShift:
    def __init__(self, noise: settings.ShiftNoise) -> None:
        self.ratio = noise.ratio

    def __call__(self, masks: Tensor, boxes: Tensor, draws: Draws) -> Tensor:
        return released_shift_noise(masks, self.ratio, boxes, draws.uniform(2))


class ReleasedScale:
    def __init__(self, noise: settings.ScaleNoise) -> None:
        self.ratio = noise.ratio

    def __call__(self, masks: Tensor, boxes: Tensor, draws: Draws) -> Tensor:
        return released_scale_noise(masks, self.ratio, boxes, draws.uniform())


def point_noise(masks: Tensor, ratio: float, scores: Tensor, amounts: Tensor) -> Tensor:
    """Flip up to ratio * area cells of each mask, anywhere on the map.

    scores [n,h*w], amounts [n]. The number of flipped cells is uniform on 0..floor(ratio * area) and the
    cells are distinct, every choice equally likely. Returns [n,h,w] bool.
    """
    if masks.shape[0] == 0 or ratio == 0:
        return masks
    cells = scores.shape[1]
    area = masks.flatten(1).sum(dim=1)
    most = (ratio * area).floor().clamp(max=cells)
    count = (amounts * (most + 1)).floor().clamp(max=most).long()
    # the cells with the `count` smallest scores; only as many scores are sorted as can be needed
    longest = min(cells, int(ratio * cells) + 1)
    order = _smallest(scores, longest)
    beyond = torch.full_like(order[:, :1], float("inf"))
    first_kept = torch.cat((order, beyond), dim=1).gather(1, count[:, None])
    return masks ^ (scores < first_kept).view_as(masks)


def _smallest(values: Tensor, count: int) -> Tensor:
    """The `count` smallest values of each row, in order: [n,P] -> [n,count]."""
    if values.device.type == "cpu":
        # numpy's vectorised selection takes an eighth of the time of torch's
        return torch.from_numpy(np.sort(np.partition(values.numpy(), count - 1, axis=1)[:, :count], axis=1))
    return values.topk(count, dim=1, largest=False).values


def released_point_noise(masks: Tensor, ratio: float, scores: Tensor) -> Tensor:
    """Flip each cell by itself with probability ratio * area / cells; scores [n,h*w]."""
    probability = ratio * masks.flatten(1).sum(dim=1, keepdim=True) / scores.shape[1]
    return masks ^ (scores < probability).view_as(masks)


def shift_noise(masks: Tensor, ratio: float, amounts: Tensor) -> Tensor:
    """Move each object by up to ratio * half the size of its box, rounded to cells; amounts [n,2] for x, y.

    The move is cut short where the object would leave the map, so no cell of it is lost.
    """
    x0, y0, x1, y1 = mask_boxes(masks).unbind(1)
    height, width = masks.shape[1:]
    reach = ratio * torch.stack((x1 - x0, y1 - y0), dim=1) / 2
    move = ((2 * amounts - 1) * reach).round().long()
    move_x = torch.minimum(torch.maximum(move[:, 0], -x0), width - x1)
    move_y = torch.minimum(torch.maximum(move[:, 1], -y0), height - y1)
    rows = torch.arange(height, device=masks.device) - move_y[:, None]
    columns = torch.arange(width, device=masks.device) - move_x[:, None]
    return _read(masks, rows, columns)


def scale_noise(masks: Tensor, ratio: float, amounts: Tensor) -> Tensor:
    """Scale each object about the centre of its box, by a factor uniform in 1 - ratio..1 + ratio.

    amounts [n].
    """
    x0, y0, x1, y1 = mask_boxes(masks).unbind(1)
    factor = (1 + ratio * (2 * amounts - 1))[:, None]

    def source(count: int, start: Tensor, end: Tensor) -> Tensor:
        center = ((start + end) / 2)[:, None]
        positions = torch.arange(count, device=masks.device) + 0.5
        return (center + (positions - center) / factor).floor().long()

    height, width = masks.shape[1:]
    return _read(masks, source(height, y0, y1), source(width, x0, x1))


def released_shift_noise(masks: Tensor, ratio: float, boxes: Tensor, amounts: Tensor) -> Tensor:
    """The released code's shift: rows move by the box's width, columns by its height.

    boxes [n,4] as (centre x, centre y, width, height) in 0..1, amounts [n,2]. Cells that leave the map pile
    up at its border.
    """
    height, width = masks.shape[1:]
    move = (2 * amounts - 1) * ratio * boxes[:, 2:] / 2 * width
    rows = torch.arange(height, device=masks.device) + move[:, :1]
    columns = torch.arange(width, device=masks.device) + move[:, 1:]
    return _write(masks, rows, columns, (height, width))


def released_scale_noise(masks: Tensor, ratio: float, boxes: Tensor, decisions: Tensor) -> Tensor:
    """The released code's scale: half of the objects are enlarged by 1 + ratio, centre x and y swapped.

    boxes [n,4] as in `released_shift_noise`; decisions [n]. Cells that leave the map pile up at its border.
    """
    height, width = masks.shape[1:]
    tall, wide = int(height * (1 + ratio)) + 1, int(width * (1 + ratio)) + 1
    from_row = torch.arange(tall, device=masks.device) * height // tall
    from_column = torch.arange(wide, device=masks.device) * width // wide
    enlarged = masks[:, from_row][:, :, from_column]
    back_y = ((height - tall) * boxes[:, :1]).trunc()
    back_x = ((width - wide) * boxes[:, 1:2]).trunc()
    rows = torch.arange(tall, device=masks.device) + back_y
    columns = torch.arange(wide, device=masks.device) + back_x
    placed = _write(enlarged, rows, columns, (height, width))
    return torch.where(decisions[:, None, None] > 0.5, placed, masks)


def label_noise(labels: Tensor, classes: int, ratio: float, decisions: Tensor, choices: Tensor) -> Tensor:
    """Replace labels by another class with probability `ratio` (MP-Former section 4.4).

    labels int64 of any shape; decisions and choices of its shape. The new class is never the old one; a
    data set of one class has no other and stays as it is.
    """
    if classes == 1:
        return labels
    other = (labels + 1 + (choices * (classes - 1)).long().clamp(max=classes - 2)) % classes
    return torch.where(decisions < ratio, other, labels)


def released_label_noise(
    labels: Tensor, classes: int, ratio: float, decisions: Tensor, choices: Tensor
) -> Tensor:
    """Replace labels by any class, the old one included, with probability `ratio`."""
    return torch.where(decisions < ratio, (choices * classes).long().clamp(max=classes - 1), labels)


def mask_boxes(masks: Tensor) -> Tensor:
    """[n,4] int64 (x0, y0, x1, y1), ends exclusive; zeros for an empty mask."""

    def extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
        count = occupied.shape[1]
        first = occupied.int().argmax(dim=1)
        end = count - occupied.flip(1).int().argmax(dim=1)
        some = occupied.any(dim=1)
        return first * some, end * some

    (x0, x1), (y0, y1) = extent(masks.any(dim=1)), extent(masks.any(dim=2))
    return torch.stack((x0, y0, x1, y1), dim=1)


def _read(masks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each output cell (i, j) of mask n takes its cell (rows[n, i], columns[n, j]); off the map is off."""
    height, width = masks.shape[1:]
    number = torch.arange(len(masks), device=masks.device)[:, None, None]
    there = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    cells = masks[number, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return cells & there


def _write(masks: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Each cell (i, j) of mask n turns (rows[n, i], columns[n, j]) on, clamped to the map, rounded down."""
    height, width = size
    row = rows.clamp(0, height - 1).long()[:, :, None].expand_as(masks)
    column = columns.clamp(0, width - 1).long()[:, None, :].expand_as(masks)
    counts = torch.zeros(len(masks), height * width, device=masks.device)
    return (
        counts.scatter_add(1, (row * width + column).flatten(1), masks.flatten(1).float()).view(-1, *size) > 0
    )
