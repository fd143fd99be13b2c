"""The matching of a training step: all heads, images and groups of pilots with one copy to the host."""

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
class Matching:
    """How the heads of a micro-batch are matched, and the random points of their losses."""

    heads: Sequence[Sequence[Match]]
    """By head and image."""
    pilots: Sequence[Tensor]
    """By head: the object that each pilot slot has to reconstruct, [B,P] int64."""
    points: Sequence[HeadPoints]
    """By head of the matching part."""
    pilot_points: Iterable[HeadPoints]
    """By head of the pilots. To be gone through once: they are many, so most are drawn when asked for."""
    failure: str | None
    """Names an image with a cost that is not finite, whose pairs mean nothing."""


@torch.no_grad()
def match_heads(
    output: Output,
    pilots: Pilots | None,
    batch: Batch,
    config: ModelConfig,
    draws: SampleRandom,
    pilot_draws: SampleRandom,
) -> Matching | None:
    """`matcher.match` for all heads; pilots within their groups, too, where they are matched (Table 9).

    None for per-pixel models, which match nothing.
    A cost that is not finite raises nothing here: a worker goes on until all of them can stop together.
    """
    if config.output == "per_pixel":
        return None
    points, costs = _matching_part(output.heads, batch, config.loss, draws)
    pilot_points, pilot_costs = _pilot_part(output.pilots or (), pilots, batch, config, pilot_draws)
    solved, failed = assign([cost for of_head in (*costs, *pilot_costs) for cost in of_head])
    images = len(batch)
    by_head = [solved[i : i + images] for i in range(0, len(solved), images)]
    matches, of_pilots = by_head[: len(costs)] or [fixed_matches(batch.targets)], by_head[len(costs) :]
    if len(matches) < len(output.heads):
        matches = matches * len(output.heads)  # the last head's, or a fixed one, for all
    objects = [_chosen_objects(pilots, batch, matched) for matched in of_pilots]
    failure = None
    if failed:
        what = "matching" if failed[0] < len(costs) * images else "matching of pilots"
        failure = f"{what}: a cost of image {batch.image_ids[failed[0] % images]} is not finite"
    if pilots is not None and not objects:
        objects = [pilots.objects] * len(output.pilots)
    return Matching(matches, objects, points, pilot_points, failure)


def _matching_part(
    heads: Sequence[Head], batch: Batch, loss: LossConfig, draws: SampleRandom
) -> tuple[list[HeadPoints], list[list[Tensor]]]:
    """The points of every head; the costs [Q,N] of every head that is matched, image by image."""
    each_head = loss.matching == "each_head"
    pairs = [min(len(t.labels), heads[0].class_logits.shape[1]) for t in batch.targets]
    points = [draw_points(pairs, loss, draws, matching=each_head or i == 0) for i in range(len(heads))]
    if loss.assignment == "fixed":
        return points, []
    matched = zip(heads if each_head else heads[-1:], points)
    sizes = batch.valid_sizes
    return points, [matching_costs(h, batch.targets, loss, drawn.matching, sizes) for h, drawn in matched]


def _pilot_part(
    heads: Sequence[Head], pilots: Pilots | None, batch: Batch, config: ModelConfig, draws: SampleRandom
) -> tuple[Iterable[HeadPoints], list[list[Tensor]]]:
    """The same of the pilots; their costs [groups,n,n] where they are matched among a group's n objects."""
    if pilots is None:
        return (), []
    loss, matched = config.loss, config.pilot.assignment == "match"
    own = _own_objects(pilots, batch)
    pairs = [len(objects) for objects in own] if loss.shared_pilot_points else pilots.counts
    points = (draw_points(pairs, loss, draws, matching=matched) for _ in heads)
    if not matched:
        return points, []
    points, costs = list(points), []
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
