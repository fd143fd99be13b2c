"""Matching against all permutations and against costs written out in float64."""

import itertools

import numpy as np
import pytest
import torch

from mpformer.config.model import Loss, Model
from mpformer.model.matcher import NonFiniteError, match
from mpformer.model.matching import match_heads
from mpformer.model.objects import in_a_row
from mpformer.model.piloting import PilotLayout, PilotPlan, plan_pilots
from mpformer.types import Head, Output, Target
from tests.model.samples import blobs, draws_of, tiny_model
from tests.model.test_points import bilinear


def random_head(queries, classes=3, size=(16, 24), seed=0, images=1):
    random = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(images, queries, classes + 1, generator=random),
        torch.randn(images, queries, *size, generator=random) * 3,
    )


def slow_costs(head, target, config, points, valid_size=None):
    """The costs of one image, each pair and point by itself."""
    rows = []
    for q in range(head.mask_logits.shape[1]):
        row = []
        for n in range(len(target.labels)):
            counted = cross_entropy = overlap = predicted = wanted = 0.0
            for x, y in points.tolist():
                if valid_size and not (
                    x < valid_size[1] / target.masks.shape[2] and y < valid_size[0] / target.masks.shape[1]
                ):
                    continue
                logit = torch.tensor(bilinear(head.mask_logits[0, q], x, y), dtype=torch.float64)
                t = bilinear(target.masks[n].double(), x, y)
                p = torch.sigmoid(logit)
                cross_entropy -= t * torch.log(p) + (1 - t) * torch.log(1 - p)
                overlap += 2 * p * t
                predicted, wanted, counted = predicted + p, wanted + t, counted + 1
            dice = 1 - (overlap + 1) / (predicted + wanted + 1)
            probability = head.class_logits[0, q].double().softmax(0)[target.labels[n]]
            row.append(
                float(
                    -config.class_weight * probability
                    + config.mask_weight * cross_entropy / counted
                    + config.dice_weight * dice
                )
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("padding", ["counted", "ignored"])
@pytest.mark.parametrize(("queries", "objects"), [(5, 3), (4, 4), (3, 5)])
def test_the_cheapest_assignment_of_all(queries, objects, padding):
    config = Loss(points=20, padding=padding)
    head, target = random_head(queries), blobs(objects)
    points = draws_of(1).rows("matching", np.array([0]), 0, 0).points(20)[0]
    valid_size = (40, 70)
    costs = slow_costs(head, target, config, points, valid_size if padding == "ignored" else None)
    found = match(head, in_a_row([target], [valid_size]), config, draws_of(1), ["a"])[0]
    count = min(queries, objects)
    assert len(found.queries) == len(set(found.queries.tolist())) == len(set(found.objects.tolist())) == count
    if queries >= objects:
        best = min(
            sum(costs[q, n] for n, q in enumerate(chosen))
            for chosen in itertools.permutations(range(queries), objects)
        )
    else:
        best = min(
            sum(costs[q, n] for q, n in enumerate(chosen))
            for chosen in itertools.permutations(range(objects), queries)
        )
    assert float(costs[found.queries, found.objects].sum()) == pytest.approx(float(best), rel=1e-5)


def test_full_masks_need_no_random_points():
    config = Loss(points=None)
    head, target = random_head(3, size=(64, 96)), blobs(2)
    found = match(head, in_a_row([target]), config, draws_of(1), ["a"])[0]
    again = match(head, in_a_row([target]), config, draws_of(1, seed=9), ["a"])[0]
    assert torch.equal(found.queries, again.queries)


def test_nothing_to_match():
    found = match(random_head(3), in_a_row([blobs(0)]), Loss(points=8), draws_of(1), ["a"])[0]
    assert len(found.queries) == len(found.objects) == 0


def test_a_cost_that_is_not_finite_names_its_image():
    head = random_head(3, images=2)
    head.mask_logits[1, 0, 3, 3] = float("nan")
    targets = [blobs(1), blobs(2)]
    with pytest.raises(NonFiniteError, match="image dog"):
        match(head, in_a_row(targets), Loss(points=None), draws_of(2), ["cat", "dog"])


def matched_pilots(head, own, target, loss, groups):
    """The object of each used slot at a head of matched pilots; own: the objects of a group."""
    count = groups * len(own)
    layout = PilotLayout((groups,), (len(own),), head.mask_logits.shape[1])
    plan = PilotPlan(layout, np.zeros(count, int), np.arange(count), np.tile(own, groups))
    config = Model(loss=loss, pilot={"assignment": "match"})
    found = match_heads(Output((head,), (head,)), plan, in_a_row([target]), ["a"], config, draws_of(1))
    assert found.failure is None
    assert found.piloted.queries.tolist() == list(range(count))
    return found.piloted.objects.tolist()


def test_pilots_are_matched_within_their_group():
    """Predictions that equal other objects' masks are given those objects, in each group by itself."""
    random = torch.Generator().manual_seed(0)
    target = Target(torch.tensor([0, 1, 2]), torch.zeros(3, 16, 24, dtype=torch.bool))
    for n in range(3):
        target.masks[n, :, 8 * n : 8 * n + 8] = True
    wanted = [2, 0, 1, 1, 2, 0, 0, 1, 2]
    sharp = target.masks[wanted].float() * 16 - 8
    head = Head(torch.randn(1, 10, 4, generator=random) * 0.01, torch.cat((sharp, sharp[:1]))[None])
    assert matched_pilots(head, [0, 1, 2], target, Loss(points=64), groups=3) == wanted


def test_a_truncated_group_is_matched_among_its_own_objects():
    target = blobs(6)
    for seed in range(4):
        head = random_head(2, seed=seed)
        assert sorted(matched_pilots(head, [4, 1], target, Loss(points=32), groups=1)) == [1, 4]


def test_a_cost_of_pilots_that_is_not_finite_names_its_image():
    config, objects = tiny_model({"assignment": "match"}), in_a_row([blobs(1), blobs(2)])
    plan = plan_pilots(objects, config.pilot, draws_of(2))
    heads = (random_head(7, images=2),), (random_head(12, images=2),)
    heads[1][0].mask_logits[1, 3] = float("nan")
    found = match_heads(Output(*heads), plan, objects, ["cat", "dog"], config, draws_of(2))
    assert found.failure == "matching of pilots: a cost of image dog is not finite"
