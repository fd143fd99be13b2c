"""Mask piloting (MP-Former sections 4.2 to 4.4, appendix B): what is fed beside the learnable queries.

Each image gets floor(n_q / n_o) groups; a group holds one pilot for each of its n_o objects. A pilot is the
embedding of its object's class; in piloted layers its attention mask is its object's mask with fresh noise.
Where the released code differs from the paper, `config.Pilot.rules` says which of the two is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpformer.config.model import Model as ModelConfig
from mpformer.config.model import Pilot as PilotConfig
from mpformer.config.model import PilotRules
from mpformer.model import noise as noises
from mpformer.model.boxes import relative_boxes
from mpformer.model.streams import SampleRandom
from mpformer.types import Pilots, Target

FINEST_STRIDE = 8
"""Stride of the finest memory; those of the three memories, coarse to fine, are 32, 16 and 8."""
LEVELS = 3


@dataclass(frozen=True)
class PilotLayout:
    """How the pilot slots of a micro-batch are used; one entry per image."""

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
    targets: Sequence[Target], config: ModelConfig, classes: int, draws: SampleRandom
) -> Pilots | None:
    """Pilots of a micro-batch, or None where mask piloting is off.

    targets: one per image, masks [N,H,W] bool; `classes` K of the data set. Random draws come from each
    image's own stream. A batch without any object gets pilots of zero slots, so that every parameter takes
    part in the step.
    """
    pilot = config.pilot
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
            labels[b, :count] = _fed_labels(target.labels[objects[b, :count]], classes, pilot, draws, b)
        if rules.padded_slots == "trained":
            groups[b, count:] = slot[count:] % max(layout.groups[b], 1)
    masks = _attention_masks(targets, objects, layout.counts, config, draws)
    return Pilots(labels, objects, groups, layout.counts, masks)


def _choose(objects: int, per_group: int, draws: SampleRandom, image: int) -> Tensor:
    """The objects of a group: all of them in order, or `per_group` of them at random."""
    if objects > per_group:
        return draws.permutation(image, objects)[:per_group]
    return torch.arange(objects, device=draws.device)


def _fed_labels(labels: Tensor, classes: int, config: PilotConfig, draws: SampleRandom, image: int) -> Tensor:
    flip = noises.label_noise if config.rules().label_flip == "other_class" else noises.released_label_noise
    decisions, choices = draws.uniform(image, len(labels)), draws.uniform(image, len(labels))
    return flip(labels, classes, config.label_noise, decisions, choices)


def _attention_masks(
    targets: Sequence[Target],
    objects: Tensor,
    counts: tuple[int, ...],
    config: ModelConfig,
    draws: SampleRandom,
) -> tuple[Tensor | None, ...]:
    """For each decoder layer [B,P,h*w] bool at its level, or None where the layer is not piloted."""
    pilot, rules = config.pilot, config.pilot.rules()
    at_every_layer = [n for n in pilot.noise if not noises.drawn_once(n, rules)]
    moved = any(n.kind in ("shift", "scale") for n in pilot.noise)
    sources = [
        _Source(target, objects[b, :count], pilot, rules, draws, b)
        for b, (target, count) in enumerate(zip(targets, counts))
    ]
    piloted = pilot.layer_numbers(config.decoder.layers)
    result: list[Tensor | None] = []
    for number, levels in enumerate(config.decoder.levels(), start=1):
        if number not in piloted:
            result.append(None)
            continue
        cells = [sources[0].pyramid[level].shape[1:].numel() for level in levels]
        allowed = torch.zeros(*objects.shape, sum(cells), dtype=torch.bool, device=objects.device)
        for b, (source, count) in enumerate(zip(sources, counts)):
            parts = []
            for level in levels:
                masks = source.pyramid[level][source.rows]
                for noise in at_every_layer:
                    masks = noises.with_noise(masks, noise, rules, draws, b)
                parts.append(~masks if rules.complement and moved and number > 1 else masks)
            allowed[b, :count] = torch.cat([part.flatten(1) for part in parts], dim=1)
        result.append(allowed)
    return tuple(result)


class _Source:
    """The masks that the pilots of one image start from.

    `pyramid`: [n,h,w] bool at each level, coarse to fine; `rows` [count]: the mask of each slot.
    """

    def __init__(
        self,
        target: Target,
        objects: Tensor,
        config: PilotConfig,
        rules: PilotRules,
        draws: SampleRandom,
        image: int,
    ) -> None:
        kinds = {n.kind for n in config.noise}
        any_pixel = rules.level_masks == "any_pixel" or not kinds & {"shift", "scale"}
        finest, self.rows = _coarser(target.masks, FINEST_STRIDE, any_pixel), objects
        once = [n for n in config.noise if noises.drawn_once(n, rules)]
        if once:
            finest, boxes = finest[objects], relative_boxes(target.masks)[objects]
            for noise in once:
                finest = noises.with_noise_once(finest, noise, boxes, draws, image)
            self.rows = torch.arange(len(objects), device=objects.device)
        levels = [finest]
        for _ in range(LEVELS - 1):
            levels.append(_coarser(levels[-1], 2, any_pixel))
        self.pyramid = tuple(reversed(levels))


def _coarser(masks: Tensor, step: int, any_pixel: bool) -> Tensor:
    """Masks [N,H,W] bool at 1/step of their size: a cell is on if any pixel in it is, or if its first is."""
    if not any_pixel:
        return masks[:, ::step, ::step]
    return masks.unflatten(2, (-1, step)).any(3).unflatten(1, (-1, step)).any(2)
