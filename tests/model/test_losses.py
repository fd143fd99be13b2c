"""Losses against sums written out object by object and point by point in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mpformer.config.model import Loss
from mpformer.model.losses import (
    Normalizers,
    consistency_losses,
    count_for_normalizers,
    matching_losses,
    pilot_losses,
)
from mpformer.model.matcher import Match
from mpformer.model.matching import match_heads
from mpformer.model.objects import in_a_row
from mpformer.model.piloting import make_pilots, plan_pilots
from mpformer.model.segmenter import structure_of
from mpformer.types import Head, Output
from tests.model.samples import batch_of, blobs, draws_of, pairs_of, tiny_model
from tests.model.test_points import bilinear

SIZE = (64, 96)
VALID = [(40, 70), (64, 96)]
NORMALIZERS = Normalizers(objects=5.0, class_weight=7.0, pilots=11.0, pilot_class_weight=13.0, queries=17.0)


def heads(count, queries, seed=0, images=2):
    random = torch.Generator().manual_seed(seed)
    return [
        Head(
            torch.randn(images, queries, 4, dtype=torch.float64, generator=random),
            torch.randn(images, queries, 16, 24, dtype=torch.float64, generator=random) * 2,
        )
        for _ in range(count)
    ]


def pilot_part(targets, config, images=2):
    """Objects, pilots and a function from heads of pilots to their losses."""
    objects, draws, structure = (
        in_a_row(targets, VALID[:2] + [(64, 33)][: images - 2]),
        draws_of(images),
        structure_of(config, 3),
    )
    plan = plan_pilots(objects, config.pilot, draws)
    pilots = make_pilots(plan, objects, config.pilot, structure, draws)

    def losses(head):
        (matching_head,) = heads(1, 7, images=images)
        found = match_heads(Output((matching_head,), (head,)), plan, objects, "abc", config, draws)
        return pilot_losses([head], pilots, objects, found.piloted, NORMALIZERS, config.loss)

    return pilots, losses


def slow_mask_losses(logits, mask, points, valid_size):
    """Cross-entropy and dice of one predicted mask with one true mask, both [h,w] maps."""
    cross_entropy = overlap = predicted = wanted = 0.0
    counted = 0
    for x, y in points.tolist():
        if valid_size and not (x < valid_size[1] / SIZE[1] and y < valid_size[0] / SIZE[0]):
            continue
        logit, t = bilinear(logits, x, y), bilinear(mask, x, y)
        p = 1 / (1 + math.exp(-logit))
        cross_entropy -= t * math.log(p) + (1 - t) * math.log(1 - p)
        overlap, predicted, wanted, counted = overlap + p * t, predicted + p, wanted + t, counted + 1
    return cross_entropy / max(counted, 1), 1 - (2 * overlap + 1) / (predicted + wanted + 1)


def slow_points(logits, config, purpose, image, rows, place=0):
    """The points of each mask: the least certain candidates, then uniform ones; rows: of each mask."""
    kept = int(config.importance * config.points)
    drawn = draws_of(2).rows(purpose, np.full(len(logits), image), np.array(rows, int), place)
    candidates = drawn.points(int(config.oversample * config.points))
    uniform = drawn.points(config.points - kept)
    result = []
    for n in range(len(logits)):
        order = sorted(candidates[n].tolist(), key=lambda p: abs(bilinear(logits[n], *p)))
        result.append(torch.tensor(order[:kept] + uniform[n].tolist()))
    return result


def slow_class_loss(logits, wanted, no_object_weight):
    total = 0.0
    for row, label in zip(logits, wanted):
        weight = no_object_weight if label == 3 else 1.0
        total -= weight * float(row.log_softmax(0)[label])
    return total


@pytest.mark.parametrize("padding", ["counted", "ignored"])
def test_matching_losses(padding):
    config = Loss(points=16, padding=padding)
    (head,) = heads(1, 6)
    targets = [blobs(2), blobs(3, seed=1)]
    matches = [
        Match(torch.tensor([1, 4]), torch.tensor([1, 0])),
        Match(torch.tensor([0, 2, 5]), torch.tensor([2, 0, 1])),
    ]
    objects = in_a_row(targets, VALID)
    got = matching_losses([head], objects, pairs_of(matches, objects), NORMALIZERS, config)
    class_loss = cross_entropy = dice = 0.0
    for b in range(2):
        wanted = [3] * 6
        for q, n in zip(matches[b].queries.tolist(), matches[b].objects.tolist()):
            wanted[q] = int(targets[b].labels[n])
        class_loss += slow_class_loss(head.class_logits[b], wanted, 0.1)
        chosen = head.mask_logits[b, matches[b].queries]
        points = slow_points(chosen, config, "losses", b, matches[b].objects.tolist())
        for logits, n, where in zip(chosen, matches[b].objects.tolist(), points):
            valid_size = VALID[b] if padding == "ignored" else None
            mask = targets[b].masks[n].double()
            parts = slow_mask_losses(logits, mask, where, valid_size)
            cross_entropy, dice = cross_entropy + parts[0], dice + parts[1]
    assert float(got["class"]) == pytest.approx(2 * class_loss / 7, rel=1e-9)
    assert float(got["mask"]) == pytest.approx(5 * cross_entropy / 5, rel=1e-5)  # points are float32
    assert float(got["dice"]) == pytest.approx(5 * dice / 5, rel=1e-5)


def test_full_masks():
    config = Loss(points=None, mask_weight=1.0, dice_weight=1.0)
    (head,) = heads(1, 3)
    targets = [blobs(1), blobs(0)]
    matches = [Match(torch.tensor([2]), torch.tensor([0])), Match(*torch.zeros(2, 0, dtype=torch.long))]
    objects = in_a_row(targets, VALID)
    got = matching_losses([head], objects, pairs_of(matches, objects), NORMALIZERS, config)
    raised = F.interpolate(head.mask_logits[:1, 2:], size=SIZE, mode="bilinear", align_corners=False)[0, 0]
    truth = targets[0].masks[0].double()
    cross_entropy = F.binary_cross_entropy_with_logits(raised, truth)
    probability = raised.sigmoid()
    dice = 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
    assert float(got["mask"]) == pytest.approx(float(cross_entropy) / 5, rel=1e-9)
    assert float(got["dice"]) == pytest.approx(float(dice) / 5, rel=1e-9)


@pytest.mark.parametrize("flavour", ["paper", "released"])
def test_pilot_losses(flavour):
    """Pilots of several groups; the released flavour trains its padding as no-object, the paper's not."""
    config = tiny_model({"queries": 12, "flavour": flavour}, {"points": 16})
    targets = [blobs(2), blobs(5, seed=1)]
    pilots, losses = pilot_part(targets, config)
    slots = pilots.labels.shape[1]
    (head,) = heads(1, slots)
    got = losses(head)
    class_loss = cross_entropy = dice = 0.0
    for b, count in enumerate(pilots.counts):
        wanted = [int(targets[b].labels[n]) for n in pilots.objects[b, :count]]
        trained = slots if flavour == "released" else count
        wanted += [3] * (trained - count)
        class_loss += slow_class_loss(head.class_logits[b, :trained], wanted, 0.1)
        points = slow_points(head.mask_logits[b, :count], config.loss, "pilot losses", b, range(count))
        for logits, n, where in zip(head.mask_logits[b], pilots.objects[b, :count].tolist(), points):
            parts = slow_mask_losses(logits, targets[b].masks[n].double(), where, None)
            cross_entropy, dice = cross_entropy + parts[0], dice + parts[1]
    assert float(got["class"]) == pytest.approx(2 * class_loss / 13, rel=1e-9)
    assert float(got["mask"]) == pytest.approx(5 * cross_entropy / 11, rel=1e-5)
    assert float(got["dice"]) == pytest.approx(5 * dice / 11, rel=1e-5)


def test_normalizers_count_what_the_losses_sum():
    targets = [blobs(2), blobs(20), blobs(0)]
    paper = tiny_model({"queries": 12}, decoder={"queries": 7})
    # objects; 2 + 7 matched, the others 0.1 each; 12 + 12 pilots; all queries
    assert count_for_normalizers(batch_of(targets), paper, structure_of(paper, 3)).tolist() == pytest.approx(
        [22, 9 + 0.1 * 12, 24, 24, 21, 0]
    )
    released = tiny_model({"queries": 40, "flavour": "released"}, decoder={"queries": 7})
    # two groups of twenty slots for each image: 4 + 40 pilots, 76 slots of padding
    assert count_for_normalizers(
        batch_of(targets), released, structure_of(released, 3)
    ).tolist() == pytest.approx([22, 10.2, 44, 44 + 7.6, 21, 0])
    none = tiny_model({"queries": 0}, decoder={"queries": 7})
    assert count_for_normalizers(batch_of(targets), none, structure_of(none, 3))[2:4].tolist() == [0, 0]


def test_no_objects_give_a_class_loss_and_zeros_in_the_graph():
    (head,) = heads(1, 4)
    head.mask_logits.requires_grad_(True)
    nothing = Match(*torch.zeros(2, 0, dtype=torch.long))
    for count in (16, None):
        config = Loss(points=count)
        objects = in_a_row([blobs(0)] * 2, VALID)
        got = matching_losses([head], objects, pairs_of([nothing] * 2, objects), NORMALIZERS, config)
        assert float(got["class"]) > 0
        assert got["mask"].item() == got["dice"].item() == 0
        (got["mask"] + got["dice"]).backward()
        assert not head.mask_logits.grad.any()


def test_layer_consistency_is_the_mask_loss_with_the_head_before():
    config = Loss(points=16, consistency_weight=0.5)
    several = heads(3, 4)
    got = consistency_losses(several, in_a_row([blobs(0)] * 2, VALID), NORMALIZERS, config, draws_of(2))
    assert len(got) == 2
    for place, (value, before, head) in enumerate(zip(got, several, several[1:])):
        total = 0.0
        for b in range(2):
            points = slow_points(head.mask_logits[b], config, "consistency", b, range(4), place)
            for q in range(4):
                label = (before.mask_logits[b, q] >= 0).double()
                cross_entropy, dice = slow_mask_losses(head.mask_logits[b, q], label, points[q], None)
                total += 5 * cross_entropy + 5 * dice
        assert float(value) == pytest.approx(0.5 * total / 17, rel=1e-5)


def test_layer_consistency_pulls_on_the_later_head_only():
    first, second = heads(2, 3)
    for head in (first, second):
        head.mask_logits.requires_grad_(True)
    config = Loss(points=None, consistency_weight=1.0)
    objects = in_a_row([blobs(0)] * 2, VALID)
    consistency_losses([first, second], objects, NORMALIZERS, config, draws_of(2))[0].backward()
    assert first.mask_logits.grad is None
    assert second.mask_logits.grad.abs().sum() > 0


def test_half_precision_is_raised_before_the_losses():
    (head,) = heads(1, 3)
    matches = [Match(torch.tensor([0]), torch.tensor([0]))] * 2
    targets, config = [blobs(1), blobs(1, seed=1)], Loss(points=64)

    def losses(dtype):
        cast = Head(head.class_logits.to(dtype), head.mask_logits.to(dtype))
        objects = in_a_row(targets, VALID)
        return matching_losses([cast], objects, pairs_of(matches, objects), NORMALIZERS, config)

    for name, value in losses(torch.bfloat16).items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(losses(torch.float64)[name]), rel=2e-2)


@pytest.mark.parametrize("padding", ["counted", "ignored"])
def test_the_compiled_form_is_the_plain_one(padding):
    """float32 on a CPU runs compiled, float64 plain: same points, same losses, same gradients."""
    config = tiny_model({"queries": 12}, {"points": 500, "padding": padding})
    targets = [blobs(2), blobs(0), blobs(5, seed=1)]
    _, losses_of = pilot_part(targets, config, images=3)
    random = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 12, 16, 24, dtype=torch.float64, generator=random)
    results = []
    for dtype in (torch.float64, torch.float32):
        logits = masks.clone().to(dtype).requires_grad_(True)
        head = Head(torch.zeros(3, 12, 4, dtype=dtype), logits)
        losses = losses_of(head)
        (losses["mask"] + 3 * losses["dice"]).backward()
        results.append((losses["mask"].item(), losses["dice"].item(), logits.grad))
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-5)
    torch.testing.assert_close(results[1][2].double(), results[0][2], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_pilot_points(dtype):
    """All pilots of an object are compared at the points at which their mean is least certain."""
    config = tiny_model({"queries": 12}, {"points": 16, "shared_pilot_points": True})
    targets = [blobs(2), blobs(5, seed=1)]
    pilots, losses = pilot_part(targets, config)
    (head,) = heads(1, pilots.labels.shape[1])
    got = losses(Head(head.class_logits.to(dtype), head.mask_logits.to(dtype)))
    cross_entropy = dice = 0.0
    for b, count in enumerate(pilots.counts):
        objects = pilots.objects[b, :count]
        means = [head.mask_logits[b, :count][objects == n].mean(0) for n in range(len(targets[b].labels))]
        points = slow_points(torch.stack(means), config.loss, "pilot losses", b, range(len(means)))
        for logits, n in zip(head.mask_logits[b], objects.tolist()):
            parts = slow_mask_losses(logits, targets[b].masks[n].double(), points[n], None)
            cross_entropy, dice = cross_entropy + parts[0], dice + parts[1]
    assert float(got["mask"]) == pytest.approx(5 * cross_entropy / 11, rel=1e-5)
    assert float(got["dice"]) == pytest.approx(5 * dice / 11, rel=1e-5)
