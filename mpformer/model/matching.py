"""The matching of a training step: all heads, images and groups of pilots, with one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpformer.config.model import Model as ModelConfig
from mpformer.model.matcher import assignment, matching_costs, matching_points, to_host_together
from mpformer.model.objects import Objects
from mpformer.model.pairs import Pairs, at_every_head, tabulate
from mpformer.model.piloting import PilotPlan
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Output


@dataclass(frozen=True)
class Matching:
    """What the heads of a micro-batch have to predict, and the random points of their losses."""

    pairs: Pairs
    piloted: Pairs | None
    """Of the mask-piloted part."""
    failure: str | None
    """Names an image with a cost that is not finite, whose pairs are meaningless."""


@torch.no_grad()
def match_heads(
    output: Output,
    plan: PilotPlan | None,
    objects: Objects,
    image_ids: Sequence[str],
    config: ModelConfig,
    draws: SampleRandom,
) -> Matching | None:
    """`matcher.match` for all heads; pilots within their groups, too, if they are matched (Table 9).

    None for per-pixel models, whose output has no queries to match.
    A cost that is not finite raises nothing here: all workers have to stop together, in the step.
    """
    if output.heads[-1].class_logits is None:
        return None
    loss = config.loss
    matched = _matched_heads(output.heads, loss.matching == "each_head", loss.assignment == "fixed")
    points = matching_points(loss, draws, len(objects.counts), len(matched), "matching")
    costs = matching_costs(matched, objects, loss, points) if matched else []
    pilot_heads = output.pilots or ()
    pilot_costs: list[Tensor] = []
    if plan is not None and config.pilot.assignment == "match":
        points = matching_points(loss, draws, len(objects.counts), len(pilot_heads), "pilot matching")
        pilot_costs = matching_costs(pilot_heads, objects, loss, points)
    solved = to_host_together([*costs, *pilot_costs])
    failures: list[str] = []
    pairs = _pairs(solved[: len(costs)], output.heads, objects, image_ids, draws, failures)
    piloted = None
    if plan is not None:
        chosen = _chosen(solved[len(costs) :], plan, objects, image_ids, failures)
        piloted = _pilot_pairs(chosen, plan, len(pilot_heads), objects, loss.shared_pilot_points, draws)
    return Matching(pairs, piloted, failures[0] if failures else None)


def _matched_heads(heads: Sequence[Head], each: bool, fixed: bool) -> Sequence[Head]:
    """The heads whose costs are needed: all, the last one for all, or none."""
    if fixed:
        return ()
    return heads if each else heads[-1:]


def _pairs(
    costs: Sequence[np.ndarray],
    heads: Sequence[Head],
    objects: Objects,
    image_ids: Sequence[str],
    draws: SampleRandom,
    failures: list[str],
) -> Pairs:
    """The pairs of all heads, given the costs [B,Q,N] of each matched one; notes images in `failures`."""
    found = []
    for number, of_head in enumerate(costs):
        for b, (start, count) in enumerate(zip(objects.starts, objects.counts)):
            solved = assignment(of_head[b, :, :count])
            if solved is None:
                failures.append(f"matching: a cost of image {image_ids[b]} is not finite")
                count = min(count, of_head.shape[1])
                solved = np.arange(count), np.arange(count)
            queries, columns = solved
            place = np.full((2, len(queries)), ((number,), (b,)))
            found.append(np.concatenate((place, [queries, start + columns])))
    if costs:
        table = np.concatenate(found, axis=1)
        if len(costs) < len(heads):  # the last head's pairs for all
            table = at_every_head(list(table[1:]), len(heads))
    else:  # class k to query k, of which only the device knows
        rows = np.arange(len(objects.images))
        table = at_every_head((objects.images, rows, rows), len(heads))
    head, image, _, object_ = table
    drawn = draws.rows("losses", image, objects.numbers[object_], head)
    columns = np.concatenate((table, [np.arange(table.shape[1])]))
    pairs = tabulate(columns, len(heads), drawn, draws.device)
    return pairs if costs else replace(pairs, queries=objects.labels[pairs.objects])


def _chosen(
    costs: Sequence[np.ndarray],
    plan: PilotPlan,
    objects: Objects,
    image_ids: Sequence[str],
    failures: list[str],
) -> np.ndarray:
    """[L,n] int64: the object that each used slot has to reconstruct at each head, a row of `Objects`.

    costs [B,P,N] of each head if pilots are matched among the objects of their group; else none, and every
    pilot has its own object ([1,n], for all heads).
    """
    if not costs:
        return plan.objects[None]
    chosen = np.tile(plan.objects, (len(costs), 1))
    for of_head, row in zip(costs, chosen):
        end = 0
        for b, (groups, each) in enumerate(zip(plan.layout.groups, plan.layout.per_group)):
            start, end = end, end + groups * each
            if start == end:
                continue
            own = plan.objects[start : start + each]
            of_image = of_head[b, : groups * each][:, own - objects.starts[b]]
            for group in range(groups):
                solved = assignment(of_image[group * each : (group + 1) * each])
                if solved is None:
                    failures.append(f"matching of pilots: a cost of image {image_ids[b]} is not finite")
                    continue
                row[start + group * each : start + (group + 1) * each] = own[solved[1]]
    return chosen


def _pilot_pairs(
    chosen: np.ndarray,
    plan: PilotPlan,
    heads: int,
    objects: Objects,
    shared: bool,
    draws: SampleRandom,
) -> Pairs:
    """The pairs of all pilots; shared: those of an object at a head share their points."""
    head, image, slot, _ = at_every_head((plan.images, plan.slots, plan.slots), heads)
    object_ = np.broadcast_to(chosen, (heads, chosen.shape[1])).reshape(-1)
    if shared:
        # in the order of heads, images and objects
        everything, rows = np.unique(head * len(objects.images) + object_, return_inverse=True)
        place, own = np.divmod(everything, max(1, len(objects.images)))
        drawn = draws.rows("pilot losses", objects.images[own], objects.numbers[own], place)
    else:
        rows = np.arange(len(head))
        drawn = draws.rows("pilot losses", image, slot, head)
    columns = np.stack((head, image, slot, object_, rows))
    return tabulate(columns, heads, drawn, draws.device)
