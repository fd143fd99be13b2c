"""Mask piloting (MP-Former sections 4.2 to 4.4, appendix B): what is fed beside the learnable queries.

Each image gets floor(n_q / n_o) groups; a group holds one pilot for each of its n_o objects. A pilot is the
embedding of its object's class; in piloted layers its attention mask is its object's mask with fresh noise.
Where the released code differs from the paper, `config.Pilot.rules` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpformer.config.model import Pilot as PilotConfig
from mpformer.config.model import PilotRules
from mpformer.model.architecture import Structure
from mpformer.model.boxes import relative_boxes
from mpformer.model.noise import PilotNoise, build_noise, label_noise, released_label_noise
from mpformer.model.streams import SampleRandom
from mpformer.types import MEMORY_STRIDES, InputError, Pilots, Target

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


@torch.no_grad()
def make_pilots(
    targets: Sequence[Target], pilot: PilotConfig, structure: Structure, draws: SampleRandom
) -> Pilots | None:
    """Pilots of a micro-batch for a model of that structure, or None where mask piloting is off.

    targets: one per image, masks [N,H,W] bool, H and W multiples of the strides. Random numbers come from
    each image's own stream. A batch without any object gets pilots of zero slots, so that every parameter
    takes part in the step.
    """
    if pilot.queries == 0:
        return None
    rules = pilot.rules()
    layout = pilot_layout([len(t.labels) for t in targets], pilot)
    device = targets[0].labels.device
    labels = torch.full((len(targets), layout.slots), -1, dtype=torch.long, device=device)
    objects = torch.zeros_like(labels)
    groups = torch.full_like(labels, -1)
    for b, (target, count) in enumerate(zip(targets, layout.counts)):
        slot = torch.arange(layout.slots, device=device)
        if count:
            chosen = _choose(len(target.labels), layout.per_group[b], draws, b)
            objects[b, :count] = chosen.repeat(layout.groups[b])
            groups[b, :count] = torch.div(slot[:count], layout.per_group[b], rounding_mode="floor")
            fed = target.labels[objects[b, :count]]
            labels[b, :count] = _with_label_noise(fed, structure.classes, pilot, draws, b)
        if rules.padded_slots == "trained":
            groups[b, count:] = slot[count:] % max(layout.groups[b], 1)
    chosen_objects = [objects[b, :count] for b, count in enumerate(layout.counts)]
    masks = _attention_masks(targets, chosen_objects, layout.slots, pilot, structure, draws)
    return Pilots(labels, objects, groups, layout.counts, masks)


def _choose(objects: int, per_group: int, draws: SampleRandom, image: int) -> Tensor:
    """The objects of a group, int64: all of them in order, or `per_group` of them at random."""
    if objects > per_group:
        return draws.permutation(image, objects)[:per_group]
    return torch.arange(objects, device=draws.device)


def _with_label_noise(
    labels: Tensor, classes: int, config: PilotConfig, draws: SampleRandom, image: int
) -> Tensor:
    flip = label_noise if config.rules().label_flip == "other_class" else released_label_noise
    decisions, choices = draws.uniform(image, len(labels)), draws.uniform(image, len(labels))
    return flip(labels, classes, config.label_noise, decisions, choices)


def _attention_masks(
    targets: Sequence[Target],
    objects: Sequence[Tensor],
    slots: int,
    pilot: PilotConfig,
    structure: Structure,
    draws: SampleRandom,
) -> tuple[Tensor | None, ...]:
    """For each attention layer [B,P,S] bool over the cells that it reads, None where it is not piloted.

    objects: for each image the objects of its used slots, int64; `slots`: P.
    """
    noise, rules = build_noise(pilot), pilot.rules()
    numbers = pilot.layer_numbers(len(structure.attention_strides))
    piloted = {number: structure.attention_strides[number - 1] for number in numbers}
    needed = sorted({stride for strides in piloted.values() for stride in strides})
    sources = [
        _Source(target, own, needed, noise, pilot, draws, b)
        for b, (target, own) in enumerate(zip(targets, objects))
    ]
    result: list[Tensor | None] = [None] * len(structure.attention_strides)
    for number, strides in piloted.items():
        # the released code takes the complement of moved masks from the second layer on
        inverted = rules.complement and pilot.moves_objects and number > 1
        cells = sum(sources[0].masks[stride].shape[1:].numel() for stride in strides)
        allowed = torch.zeros(len(targets), slots, cells, dtype=torch.bool, device=targets[0].masks.device)
        for b, source in enumerate(sources):
            parts = [_noised(source, stride, noise, draws, b) for stride in strides]
            masks = torch.cat([part.flatten(1) for part in parts], dim=1)
            allowed[b, : len(masks)] = ~masks if inverted else masks
        result[number - 1] = allowed
    return tuple(result)


def _noised(source: _Source, stride: int, noise: PilotNoise, draws: SampleRandom, image: int) -> Tensor:
    """The masks of an image's used slots at a stride, [count,h,w] bool, with fresh noise."""
    masks = source.masks[stride][source.rows]
    for apply in noise.at_each_layer:
        noised = apply(masks, draws, image)
        if noised.shape != masks.shape or noised.dtype != torch.bool:
            raise InputError(
                f"model.pilot.noise: {apply}: masks torch.bool {list(masks.shape)} expected, not "
                f"{noised.dtype} {list(noised.shape)}"
            )
        masks = noised
    return masks


class _Source:
    """The masks that the pilots of one image start from in every layer.

    `masks`: by stride [n,h,w] bool; `rows` [count]: the row of each used slot.
    """

    def __init__(
        self,
        target: Target,
        objects: Tensor,
        strides: Sequence[int],
        noise: PilotNoise,
        pilot: PilotConfig,
        draws: SampleRandom,
        image: int,
    ) -> None:
        any_pixel = pilot.rules().level_masks == "any_pixel" or not pilot.moves_objects
        finest = min(strides, default=_RELEASED_STRIDE)
        if noise.at_once:
            finest = min(finest, _RELEASED_STRIDE)
        masks, self.rows = _coarser(target.masks, finest, any_pixel), objects
        if noise.at_once:
            masks, boxes = masks[objects], relative_boxes(target.masks)[objects]
            for apply in noise.at_once:
                masks = apply(masks, boxes, draws, image)
            self.rows = torch.arange(len(objects), device=objects.device)
        self.masks = {stride: _coarser(masks, stride // finest, any_pixel) for stride in strides}


def _coarser(masks: Tensor, step: int, any_pixel: bool) -> Tensor:
    """Masks [N,H,W] bool at 1/step of their size: a cell is on if any pixel in it is, or if its first is."""
    if step == 1:
        return masks
    if not any_pixel:
        return masks[:, ::step, ::step]
    return masks.unflatten(2, (-1, step)).any(3).unflatten(1, (-1, step)).any(2)
