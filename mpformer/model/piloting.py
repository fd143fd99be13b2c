"""Mask piloting (MP-Former sections 4.2 to 4.4, appendix B): what is fed beside the learnable queries.

Each image gets floor(n_q / n_o) groups; a group holds one pilot for each of its n_o objects. A pilot is the
embedding of its object's class; in piloted layers its attention mask is its object's mask with fresh noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpformer.config import Pilot as PilotConfig
from mpformer.model.noise import label_noise, point_noise
from mpformer.model.streams import SampleRandom
from mpformer.types import Pilots, Target

STRIDES = (32, 16, 8)
"""Strides of the memories that decoder layers 1, 2, 3, 4, ... read in turn."""


def pilot_slots(objects: int, queries: int) -> int:
    """Pilots of an image with that many objects: whole groups, or one group of n_q when there are more."""
    if objects == 0:
        return 0
    return queries if objects > queries else queries // objects * objects


def make_pilots(
    targets: Sequence[Target], config: PilotConfig, layers: int, classes: int, streams: SampleRandom
) -> Pilots | None:
    """Pilots of a micro-batch, or None where mask piloting is off.

    targets: one per image, masks [N,H,W] bool; `layers` of the decoder; `classes` K of the data set. Random
    draws come from each image's own stream. A batch without any object gets pilots of zero slots, so that
    every parameter takes part in the step.
    """
    if config.queries == 0:
        return None
    counts = tuple(pilot_slots(len(t.labels), config.queries) for t in targets)
    slots = max(counts, default=0)
    device = targets[0].labels.device
    labels = torch.zeros(len(targets), slots, dtype=torch.long, device=device)
    objects = torch.zeros_like(labels)
    groups = torch.full_like(labels, -1)
    pyramids = []
    for b, (target, count) in enumerate(zip(targets, counts)):
        pyramids.append(_any_pixel_pyramid(target.masks))
        if count == 0:
            continue
        per_group = min(len(target.labels), config.queries)
        slot = torch.arange(count, device=device)
        chosen = slot % per_group
        if len(target.labels) > per_group:
            chosen = streams.permutation(b, len(target.labels))[:per_group]
        objects[b, :count] = chosen
        groups[b, :count] = torch.div(slot, per_group, rounding_mode="floor")
        labels[b, :count] = label_noise(
            target.labels[chosen],
            classes,
            config.label_noise,
            streams.uniform(b, count),
            streams.uniform(b, count),
        )
    piloted = config.layer_numbers(layers)
    masks = tuple(
        _attention_masks(pyramids, objects, counts, i % len(STRIDES), config, streams)
        if i + 1 in piloted
        else None
        for i in range(layers)
    )
    return Pilots(labels, objects, groups, counts, masks)


def _any_pixel_pyramid(masks: Tensor) -> tuple[Tensor, ...]:
    """Masks [N,H,W] at strides 32, 16, 8, flattened to [N,h*w]: a cell is on if any pixel in it is."""
    levels = []
    for stride in reversed(STRIDES):
        # each level from the next finer one
        step = stride if not levels else 2
        masks = masks.unflatten(2, (-1, step)).any(3).unflatten(1, (-1, step)).any(2)
        levels.append(masks.flatten(1))
    return tuple(reversed(levels))


def _attention_masks(
    pyramids: list[tuple[Tensor, ...]],
    objects: Tensor,
    counts: tuple[int, ...],
    level: int,
    config: PilotConfig,
    streams: SampleRandom,
) -> Tensor:
    cells = pyramids[0][level].shape[1]
    result = torch.zeros(*objects.shape, cells, dtype=torch.bool, device=objects.device)
    for b, (pyramid, count) in enumerate(zip(pyramids, counts)):
        masks = pyramid[level][objects[b, :count]]
        if config.noise.kind == "point":
            masks = point_noise(
                masks, config.noise.ratio, streams.uniform(b, count, cells), streams.uniform(b, count)
            )
        result[b, :count] = masks
    return result
