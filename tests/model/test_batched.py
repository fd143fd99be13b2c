"""Pilots, matching and losses of a micro-batch against the same image by image, in float64, by switch."""

import pytest
import torch

from mpformer.model.losses import Normalizers, consistency_losses, matching_losses, pilot_losses
from mpformer.model.matching import match_heads
from mpformer.model.objects import objects_of
from mpformer.model.piloting import make_pilots, plan_pilots
from mpformer.model.segmenter import structure_of
from mpformer.model.streams import SampleRandom
from mpformer.types import Head, Output, Target
from tests.model.plain import Plain
from tests.model.samples import CPU, batch_of, blobs, tiny_model

CLASSES = 3
VALID = [(40, 70), (64, 96), (64, 33), (64, 96)]
NORMALIZERS = Normalizers(objects=5.0, class_weight=7.0, pilots=11.0, pilot_class_weight=13.0, queries=17.0)
COUNTS = ([3, 0, 1, 2], [0, 0], [2, 9])

SWITCHES = {
    "mp-former": ({}, {}, {}),
    "shift": ({"noise": {"kind": "shift"}}, {}, {}),
    "scale": ({"noise": {"kind": "scale"}}, {}, {}),
    "all noise": ({"noise": [{"kind": "shift"}, {"kind": "scale"}, {"kind": "point", "ratio": 0.5}]}, {}, {}),
    "some layers": ({"layers": [2, 4]}, {}, {}),
    "all scales": ({}, {}, {"features": "all_scales"}),
    "released": ({"flavour": "released"}, {}, {}),
    "released shift": ({"flavour": "released", "noise": {"kind": "shift"}}, {}, {}),
    "released scale": ({"flavour": "released", "noise": {"kind": "scale"}}, {}, {}),
    "released shift and scale": (
        {"flavour": "released", "noise": [{"kind": "shift"}, {"kind": "scale"}]},
        {},
        {},
    ),
    "matched pilots": ({"assignment": "match"}, {}, {}),
    "fixed matching": ({}, {"matching": "last_head"}, {}),
    "shared pilot points": ({}, {"shared_pilot_points": True}, {}),
    "shared and matched": ({"assignment": "match"}, {"shared_pilot_points": True}, {}),
    "padding ignored": ({"assignment": "match"}, {"padding": "ignored"}, {}),
    "full masks": ({"assignment": "match"}, {"points": None}, {}),
    "full masks, padding ignored": ({}, {"points": None, "padding": "ignored"}, {}),
    "other points to match": ({}, {"match_points": 20}, {}),
    "full masks to match": ({}, {"match_points": None}, {}),
    "focal": ({"assignment": "match"}, {"mask_loss": "focal"}, {}),
    "focal, padding ignored": ({}, {"mask_loss": "focal", "padding": "ignored"}, {}),
    "boxes": ({}, {"match_by": "boxes"}, {}),
    "consistency": ({}, {"consistency_weight": 0.5}, {}),
    "consistency on full masks": ({}, {"consistency_weight": 0.5, "points": None, "padding": "ignored"}, {}),
}


def random_heads(count, images, queries, boxes, seed):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    return tuple(
        Head(
            normal(images, queries, CLASSES + 1).requires_grad_(True),
            (normal(images, queries, 16, 24) * 3).requires_grad_(True),
            normal(images, queries, 4).sigmoid().detach().requires_grad_(True) if boxes else None,
        )
        for _ in range(count)
    )


def by_image(pairs, objects):
    """By head and image: the queries and objects of the pairs, numbered within the image."""
    result = []
    for head in range(len(pairs.counts)):
        own = pairs.of_head(head)
        assert (pairs.heads[own] == head).all()
        images, numbers = pairs.images[own], torch.from_numpy(objects.numbers)[pairs.objects[own]]
        assert (images == torch.from_numpy(objects.images)[pairs.objects[own]]).all()
        result.append(
            [(pairs.queries[own][images == b], numbers[images == b]) for b in range(len(objects.counts))]
        )
    return result


def gradients(losses, heads):
    """Of a weighted sum of all losses, with respect to all predictions."""
    total = sum((values * torch.arange(1.0, len(values) + 1)).sum() for values in losses.values())
    leaves = [t for head in heads for t in (head.class_logits, head.mask_logits, head.boxes) if t is not None]
    return torch.autograd.grad(total, leaves, allow_unused=True)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, values in got.items():
        torch.testing.assert_close(
            values, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


FAST = (
    "mp-former",
    "matched pilots",
    "shared pilot points",
    "released shift",
    "focal, padding ignored",
    "boxes",
)


@pytest.mark.parametrize(
    ("switch", "counts"),
    [
        pytest.param(s, c, marks=() if s in FAST and c == COUNTS[0] else pytest.mark.slow, id=f"{s}-{c}")
        for s in SWITCHES
        for c in COUNTS
    ],
)
def test_the_batched_form_is_the_plain_one(switch, counts):
    pilot, loss, decoder = SWITCHES[switch]
    config = tiny_model({"queries": 6, **pilot}, {"points": 24, **loss}, {"queries": 4, **decoder})
    structure = structure_of(config, CLASSES)
    targets = [blobs(n, seed=i) for i, n in enumerate(counts)]
    batch = batch_of(targets, VALID[: len(counts)])
    draws = SampleRandom(5, batch.positions, CPU)
    plain = Plain(batch, config, structure, draws)

    objects = objects_of(batch)
    plan = plan_pilots(objects, config.pilot, draws)
    pilots = make_pilots(plan, objects, config.pilot, structure, draws)
    each, layout = plain.pilots()
    assert pilots.counts == layout.counts
    for b, (labels, own, groups, masks) in enumerate(each):
        used = len(own)
        assert torch.equal(pilots.labels[b, :used], labels)
        assert torch.equal(pilots.objects[b, :used], own)
        assert torch.equal(pilots.groups[b, :used], groups)
        for index, of_layer in enumerate(pilots.attention_masks):
            assert (of_layer is None) == (index not in masks)
            if of_layer is not None:
                assert torch.equal(of_layer[b, :used], masks[index])
                assert not of_layer[b, used:].any()

    boxes = config.loss.match_by == "boxes"
    heads = random_heads(2, len(batch), structure.queries, boxes, seed=1)
    pilot_heads = random_heads(2, len(batch), layout.slots, boxes, seed=2)
    matching = match_heads(Output(heads, pilot_heads), plan, objects, batch.image_ids, config, draws)
    assert matching.failure is None
    got = matching_losses(heads, objects, matching.pairs, NORMALIZERS, config.loss)
    matches = by_image(matching.pairs, objects)
    chosen = by_image(matching.piloted, objects)
    with torch.no_grad():
        plain.check_matches(heads, matches)
        plain.check_pilots(pilot_heads, each, chosen)
    every = [structure.queries] * len(batch)
    expected = plain.part(heads, matches, every, "losses", "object", (5.0, 7.0))
    assert_same(got, expected)
    assert_same_gradients(gradients(got, heads), gradients(expected, heads))

    got = pilot_losses(pilot_heads, pilots, objects, matching.piloted, NORMALIZERS, config.loss)
    trained = layout.counts if config.pilot.rules().padded_slots == "unseen" else [layout.slots] * len(batch)
    shared = config.loss.shared_pilot_points
    expected = plain.part(pilot_heads, chosen, trained, "pilot losses", "slot", (11.0, 13.0), shared)
    assert_same(got, expected)
    assert_same_gradients(gradients(got, pilot_heads), gradients(expected, pilot_heads))

    if config.loss.consistency_weight:
        got = {"consistency": consistency_losses(heads, objects, NORMALIZERS, config.loss, draws)}
        expected = {"consistency": plain.consistency(heads, 17.0)}
        assert_same(got, expected)
        assert_same_gradients(gradients(got, heads), gradients(expected, heads))


def assert_same_gradients(got, expected):
    for a, b in zip(got, expected):
        if a is None or b is None:  # a prediction that takes no part
            assert not any(g.any() for g in (a, b) if g is not None)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("noise", ["point", "shift", "scale"])
def test_a_pilot_does_not_depend_on_those_beside_it(noise):
    """The same image in another place of another batch gets the same pilots."""
    config = tiny_model({"noise": {"kind": noise}})
    structure = structure_of(config, CLASSES)
    wanted = []
    for targets, positions, place in (([blobs(3)], (7,), 0), ([blobs(5, seed=1), blobs(3)], (2, 7), 1)):
        objects, draws = objects_of(batch_of(targets)), SampleRandom(0, positions, CPU)
        pilots = make_pilots(
            plan_pilots(objects, config.pilot, draws), objects, config.pilot, structure, draws
        )
        wanted.append((pilots.labels[place, :12], *(m[place, :12] for m in pilots.attention_masks)))
    assert all(torch.equal(a, b) for a, b in zip(*wanted))


def test_300_objects_of_one_image():
    config = tiny_model({"queries": 12})
    batch = batch_of([blobs(300), blobs(1), Target(*blobs(0).__dict__.values())])
    draws, objects = SampleRandom(0, batch.positions, CPU), objects_of(batch)
    plan = plan_pilots(objects, config.pilot, draws)
    assert plan.layout.counts == (12, 12, 0)
    heads = random_heads(2, 3, 7, False, 0)
    pilots = random_heads(2, 3, 12, False, 1)
    found = match_heads(Output(heads, pilots), plan, objects, batch.image_ids, config, draws)
    assert found.pairs.counts == (8, 8)
    assert found.piloted.counts == (24, 24)


def test_kinds_of_released_noise_have_numbers_of_their_own():
    """Whether an object is enlarged does not follow from where it moves."""
    noise = [{"kind": "shift", "ratio": 1.0}, {"kind": "scale", "ratio": 0.5}]
    config = tiny_model(
        {"queries": 100, "flavour": "released", "noise": noise}, decoder={"features": "stride_8"}
    )
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[0, 24:40, 40:56] = True
    objects = objects_of(batch_of([Target(torch.tensor([0]), mask)]))
    draws = SampleRandom(0, (0,), CPU)
    plan = plan_pilots(objects, config.pilot, draws)
    shown = make_pilots(plan, objects, config.pilot, structure_of(config, CLASSES), draws).attention_masks[0]
    shown = shown[0].unflatten(1, (8, 12))
    large = shown.flatten(1).sum(1) > 4  # the object has 2 x 2 cells
    first_row = shown.any(2).int().argmax(1)
    both_ways = [set((first_row[large] < 3).tolist()), set((first_row[~large] < 3).tolist())]
    assert both_ways == [{False, True}] * 2
