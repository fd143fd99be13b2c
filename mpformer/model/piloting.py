"""Mask piloting (MP-Former sections 4.2 to 4.4, appendix B): what is fed beside the learnable queries.

Each image gets floor(n_q / n_o) groups; a group holds one pilot for each of its n_o objects. A pilot is the
embedding of its object's class; in piloted layers its attention mask is its object's mask with fresh noise.
Where the released code differs from the paper, `config.Pilot.rules` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpformer.config.model import Pilot as PilotConfig
from mpformer.config.model import PilotRules
from mpformer.model.architecture import Structure
from mpformer.model.noise import PilotNoise, build_noise, label_noise, released_label_noise
from mpformer.model.objects import Objects
from mpformer.model.streams import Draws, SampleRandom
from mpformer.model.transfer import to_device
from mpformer.types import MEMORY_STRIDES, InputError, Pilots

_RELEASED_STRIDE = MEMORY_STRIDES[-1]
"""At which the released code moves masks, whatever maps the layers read."""


@dataclass(frozen=True)
class PilotLayout:
    """How the pilot slots of a micro-batch are used: one entry per image in each tuple."""

    groups: tuple[int, ...]
    per_group: tuple[int, ...]
    """Objects of each group."""
    slots: int
    """Slots of every image, used or not."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Slots that hold an object."""
        return tuple(g * n for g, n in zip(self.groups, self.per_group))

    def fillers(self, rules: PilotRules) -> int:
        """Slots without an object that are nevertheless trained (as no-object)."""
        if rules.padded_slots == "unseen":
            return 0
        return self.slots * len(self.groups) - sum(self.counts)


def pilot_layout(objects: Sequence[int], config: PilotConfig) -> PilotLayout:
    """Groups and slots for images with that many objects each."""
    most, queries = max(objects, default=0), config.queries
    if config.rules().groups == "per_batch":
        # one number of groups from the fullest image; more objects than n_q switch pilots off
        groups = queries // most if 0 < most <= queries else 0
        return PilotLayout(
            (groups,) * len(objects), tuple(n if groups else 0 for n in objects), groups * most
        )
    # more objects than n_q: one group of n_q objects
    per_group = tuple(min(n, queries) for n in objects)
    groups_of = tuple(queries // n if n else 0 for n in per_group)
    return PilotLayout(groups_of, per_group, max((g * n for g, n in zip(groups_of, per_group)), default=0))


@dataclass(frozen=True)
class PilotPlan:
    """Which slot of which image gets which object: of all n used slots, image after image."""

    layout: PilotLayout
    images: np.ndarray
    """[n] int64"""
    slots: np.ndarray
    """[n] int64: number within the image."""
    objects: np.ndarray
    """[n] int64: row of `Objects`. Each group of an image holds the same objects in the same order."""


def plan_pilots(objects: Objects, pilot: PilotConfig, draws: SampleRandom) -> PilotPlan | None:
    """The use of the pilot slots, or None where mask piloting is off. Nothing here touches the device."""
    if pilot.queries == 0:
        return None
    layout = pilot_layout(objects.counts, pilot)
    images = np.repeat(np.arange(len(layout.counts)), layout.counts)
    slots = np.concatenate([np.empty(0, np.int64), *map(np.arange, layout.counts)])
    groups = zip(layout.groups, _chosen(objects, layout.per_group, draws))
    chosen = np.concatenate([np.empty(0, np.int64), *(np.tile(own, count) for count, own in groups)])
    return PilotPlan(layout, images, slots, chosen)


def _chosen(objects: Objects, per_group: Sequence[int], draws: SampleRandom) -> list[np.ndarray]:
    """The objects of a group of each image: all of them in order, or so many of them at random."""
    each = np.split(np.arange(len(objects.images)), objects.starts[1:])
    if any(count > kept for count, kept in zip(objects.counts, per_group)):
        scores = draws.on_host().rows("pilot objects", objects.images, objects.numbers, 0).uniform().numpy()
        # where there are no more objects than places their order stays
        each = [
            own if len(own) <= kept else own[np.argsort(scores[own])][:kept]
            for own, kept in zip(each, per_group)
        ]
    return each


@torch.no_grad()
def make_pilots(
    plan: PilotPlan, objects: Objects, pilot: PilotConfig, structure: Structure, draws: SampleRandom
) -> Pilots:
    """Pilots of a micro-batch for a model of that structure.

    Height and width of the masks are multiples of the strides. A batch without any object gets pilots of zero
    slots, so that every parameter takes part in the step.
    """
    images, slots, rows = to_device(
        torch.from_numpy(np.stack((plan.images, plan.slots, plan.objects))), draws.device
    )
    labels = rows.new_full((len(objects.counts), plan.layout.slots), -1)
    fed = draws.rows("pilot labels", plan.images, plan.slots, 0)
    labels[images, slots] = _with_label_noise(objects.labels[rows], structure.classes, pilot, fed)
    own, groups = _slots_of(plan, objects, pilot.rules())
    cells = _attention_masks(plan, objects, rows, pilot, structure, draws)
    allowed = [
        None if of_layer is None else _in_slots(of_layer, images, slots, labels.shape) for of_layer in cells
    ]
    both = to_device(torch.from_numpy(np.stack((own, groups))), draws.device)
    return Pilots(labels, both[0], both[1], plan.layout.counts, tuple(allowed))


def _slots_of(plan: PilotPlan, objects: Objects, rules: PilotRules) -> tuple[np.ndarray, np.ndarray]:
    """[B,P] int64 both: each slot's object, a number within its image, and its group; see `Pilots`."""
    layout = plan.layout
    shape = len(objects.counts), layout.slots
    own, groups = np.zeros(shape, np.int64), np.full(shape, -1)
    own[plan.images, plan.slots] = objects.numbers[plan.objects]
    for of_image, count, number, each in zip(groups, layout.counts, layout.groups, layout.per_group):
        of_image[:count] = np.arange(count) // max(1, each)
        if rules.padded_slots == "trained":
            of_image[count:] = np.arange(count, layout.slots) % max(1, number)
    return own, groups


def _with_label_noise(labels: Tensor, classes: int, config: PilotConfig, draws: Draws) -> Tensor:
    flip = label_noise if config.rules().label_flip == "other_class" else released_label_noise
    return flip(labels, classes, config.label_noise, draws.uniform(), draws.uniform())


def _in_slots(masks: Tensor, images: Tensor, slots: Tensor, shape: Sequence[int]) -> Tensor:
    """Masks of the used slots [n,S] bool as [B,P,S], padding being off."""
    allowed = masks.new_zeros(*shape, masks.shape[1])
    allowed[images, slots] = masks
    return allowed


def _attention_masks(
    plan: PilotPlan,
    objects: Objects,
    rows: Tensor,
    pilot: PilotConfig,
    structure: Structure,
    draws: SampleRandom,
) -> list[Tensor | None]:
    """For each attention layer [n,S] bool over the cells that it reads, None where it is not piloted.

    rows [n]: the object of each used slot, a row of `objects`.
    """
    noise, rules = build_noise(pilot), pilot.rules()
    numbers = pilot.layer_numbers(len(structure.attention_strides))
    piloted = {number: structure.attention_strides[number - 1] for number in numbers}
    needed = sorted({stride for strides in piloted.values() for stride in strides})
    any_pixel = rules.level_masks == "any_pixel" or not pilot.moves_objects
    finest = min(needed, default=_RELEASED_STRIDE)
    if noise.at_once:
        finest = min(finest, _RELEASED_STRIDE)
    masks = _coarser(objects.masks, finest, any_pixel)
    if noise.at_once:
        masks, boxes = masks[rows], objects.boxes[rows]
        drawn = draws.rows("pilot noise", plan.images, plan.slots, 0)
        for apply in noise.at_once:
            masks = apply(masks, boxes, drawn)
    sources = {stride: _coarser(masks, stride // finest, any_pixel) for stride in needed}
    result: list[Tensor | None] = [None] * len(structure.attention_strides)
    for number, strides in piloted.items():
        # the released code takes the complement of moved masks from the second layer on
        inverted = rules.complement and pilot.moves_objects and number > 1
        parts = []
        for map_number, stride in enumerate(strides):
            source = sources[stride] if noise.at_once else sources[stride][rows]
            place = number * len(MEMORY_STRIDES) + map_number
            parts.append(_noised(source, noise, draws.rows("pilot noise", plan.images, plan.slots, place)))
        cells = torch.cat([part.flatten(1) for part in parts], dim=1)
        result[number - 1] = ~cells if inverted else cells
    return result


def _noised(masks: Tensor, noise: PilotNoise, draws: Draws) -> Tensor:
    """The masks of all used slots at a stride, [n,h,w] bool, with fresh noise."""
    for apply in noise.at_each_layer:
        noised = apply(masks, draws)
        if noised.shape != masks.shape or noised.dtype != torch.bool:
            raise InputError(
                f"model.pilot.noise: {apply}: masks torch.bool {list(masks.shape)} expected, not "
                f"{noised.dtype} {list(noised.shape)}"
            )
        masks = noised
    return masks


def _coarser(masks: Tensor, step: int, any_pixel: bool) -> Tensor:
    """Masks [N,H,W] bool at 1/step of their size: a cell is on if any pixel in it is, or if its first is."""
    if step == 1:
        return masks
    if not any_pixel:
        return masks[:, ::step, ::step]
    return masks.unflatten(2, (-1, step)).any(3).unflatten(1, (-1, step)).any(2)
