"""The matching of a training step: all heads, images and groups of pilots, with one copy to the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpformer.config.model import Loss as LossConfig
from mpformer.config.model import Model as ModelConfig
from mpformer.model.matcher import Match, assign, fixed_matches, matching_costs
from mpformer.model.points import HeadPoints, draw_points
from mpformer.model.streams import SampleRandom
from mpformer.types import Batch, Head, Output, Pilots


@dataclass(frozen=True)
class PilotMatching:
    """What the pilots of a micro-batch have to reconstruct, and the random points of their losses."""

    pilots: Pilots
    objects: Sequence[Tensor]
    """By head: the object of each pilot slot, [B,P] int64."""
    points: Iterable[HeadPoints]
    """By head. Single-use iterator: the points are many, so most are drawn when they are needed."""


@dataclass(frozen=True)
class Matching:
    """How the heads of a micro-batch are matched, and the random points of their losses."""

    heads: Sequence[Sequence[Match]]
    """By head and image."""
    points: Sequence[HeadPoints]
    """By head."""
    piloted: PilotMatching | None
    failure: str | None
    """Names an image with a cost that is not finite, whose pairs are meaningless."""


@torch.no_grad()
def match_heads(
    output: Output,
    pilots: Pilots | None,
    batch: Batch,
    config: ModelConfig,
    draws: SampleRandom,
    pilot_draws: SampleRandom,
) -> Matching | None:
    """`matcher.match` for all heads; pilots within their groups, too, if they are matched (Table 9).

    None for per-pixel models, whose output has no queries to match.
    A cost that is not finite raises nothing here: all workers have to stop together, in the step.
    """
    if output.heads[-1].class_logits is None:
        return None
    points, costs = _matching_part(output.heads, batch, config.loss, draws)
    pilot_heads = output.pilots or ()
    pilot_points, pilot_costs = _pilot_part(pilot_heads, pilots, batch, config, pilot_draws)
    solved, failed = assign([cost for of_head in (*costs, *pilot_costs) for cost in of_head])
    images = len(batch)
    by_head = [solved[i : i + images] for i in range(0, len(solved), images)]
    matches, of_pilots = by_head[: len(costs)] or [fixed_matches(batch.targets)], by_head[len(costs) :]
    if len(matches) < len(output.heads):
        matches = matches * len(output.heads)  # the last head's, or a fixed one, for all
    failure = None
    if failed:
        what = "matching" if failed[0] < len(costs) * images else "matching of pilots"
        failure = f"{what}: a cost of image {batch.image_ids[failed[0] % images]} is not finite"
    piloted = None
    if pilots is not None:
        objects = [_chosen_objects(pilots, batch, matched) for matched in of_pilots]
        piloted = PilotMatching(pilots, objects or [pilots.objects] * len(pilot_heads), pilot_points)
    return Matching(matches, points, piloted, failure)


def _matching_part(
    heads: Sequence[Head], batch: Batch, loss: LossConfig, draws: SampleRandom
) -> tuple[list[HeadPoints], list[list[Tensor]]]:
    """The points of every head; the costs [Q,N] of every head that is matched, image by image."""
    each_head = loss.matching == "each_head"
    pairs = [min(len(t.labels), heads[0].query_classes.shape[1]) for t in batch.targets]
    points = [draw_points(pairs, loss, draws, matching=each_head or i == 0) for i in range(len(heads))]
    if loss.assignment == "fixed":
        return points, []
    matched = zip(heads if each_head else heads[-1:], points)
    sizes = batch.valid_sizes
    return points, [matching_costs(h, batch.targets, loss, drawn.matching, sizes) for h, drawn in matched]


def _pilot_part(
    heads: Sequence[Head], pilots: Pilots | None, batch: Batch, config: ModelConfig, draws: SampleRandom
) -> tuple[Iterable[HeadPoints], list[list[Tensor]]]:
    """The same for the pilots; their costs [groups,n,n] if they are matched among a group's n objects."""
    if pilots is None:
        return (), []
    loss, matched = config.loss, config.pilot.assignment == "match"
    own = _own_objects(pilots, batch)
    pairs = [len(objects) for objects in own] if loss.shared_pilot_points else pilots.counts
    drawn_later = (draw_points(pairs, loss, draws, matching=matched) for _ in heads)
    if not matched:
        return drawn_later, []
    points, costs = list(drawn_later), []
    for head, drawn in zip(heads, points):
        of_all = matching_costs(head, batch.targets, loss, drawn.matching, batch.valid_sizes)
        of_own = [cost[:count, objects] for cost, count, objects in zip(of_all, pilots.counts, own)]
        costs.append([cost.unflatten(0, (-1, max(1, cost.shape[1]))) for cost in of_own])
    return points, costs


def _own_objects(pilots: Pilots, batch: Batch) -> list[Tensor]:
    """The objects of one group of each image, [n] int64."""
    counts = zip(pilots.counts, batch.targets)
    return [row[: min(n, len(t.labels))] for row, (n, t) in zip(pilots.objects, counts)]


def _chosen_objects(pilots: Pilots, batch: Batch, matches: Sequence[Match]) -> Tensor:
    """[B,P] int64: the object of each pilot slot, given the pairs of each image, group after group."""
    objects = pilots.objects.clone()
    for row, own, chosen in zip(objects, _own_objects(pilots, batch), matches):
        row[: len(chosen.objects)] = own[chosen.objects]
    return objects
