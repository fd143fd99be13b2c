"""What pilots are made of: groups, labels, masks at each level; the points where paper and code differ."""

import pytest
import torch
from torch.nn import functional as F

from mpformer.config import Config
from mpformer.config.model import Pilot
from mpformer.model.piloting import pilot_layout
from tests.model.samples import blobs, draws_of, pilots_for, tiny_model

SIZE = (64, 96)
LEVELS = [(2, 3), (4, 6), (8, 12)]


def pilots_of(targets, pilot=None, decoder=None, seed=0, classes=3):
    config = tiny_model(pilot, decoder=decoder)
    return pilots_for(targets, config, draws_of(len(targets), seed), classes)


@pytest.mark.parametrize(
    ("objects", "groups"), [(1, 100), (3, 33), (7, 14), (50, 2), (51, 1), (100, 1), (120, 1), (0, 0)]
)
def test_groups_are_those_of_appendix_b(objects, groups):
    layout = pilot_layout([objects], Pilot(queries=100))
    assert layout.groups == (groups,)
    assert layout.counts == (groups * min(objects, 100),)


def test_groups_hold_every_object_once():
    pilots = pilots_of([blobs(5), blobs(0), blobs(2)], {"queries": 12, "label_noise": 0.0})
    assert pilots.counts == (10, 0, 12)
    assert pilots.objects[0, :10].tolist() == [0, 1, 2, 3, 4] * 2
    assert pilots.groups[0].tolist() == [0] * 5 + [1] * 5 + [-1] * 2
    assert pilots.groups[1].tolist() == [-1] * 12
    assert pilots.groups[2].tolist() == [i // 2 for i in range(12)]
    assert pilots.labels[0, :10].tolist() == blobs(5).labels.tolist() * 2
    assert pilots.labels[0, 10:].tolist() == [-1, -1]


def test_too_many_objects_give_one_group_of_different_ones():
    chosen = [pilots_of([blobs(40)], {"queries": 12}, seed=s).objects[0].tolist() for s in range(20)]
    assert all(len(set(c)) == 12 and max(c) < 40 for c in chosen)
    assert len({tuple(c) for c in chosen}) == 20
    assert {i for c in chosen for i in c} == set(range(40))


def test_no_objects_and_no_piloting():
    pilots = pilots_of([blobs(0), blobs(0)])
    assert pilots.labels.shape == (2, 0)
    assert pilots_of([blobs(3)], {"queries": 0}) is None


@pytest.mark.parametrize(
    ("layers", "flavour", "expected"),
    [
        ("all", "paper", {1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ("first", "paper", {1}),
        ("first_three", "paper", {1, 2, 3}),
        ((2, 5, 9), "paper", {2, 5, 9}),
        ("first", "released", {1, 2, 3, 4}),
        ("first_three", "released", {1, 2, 3, 4}),
        ((2, 5), "released", {2, 5}),
    ],
)
def test_piloted_layers(layers, flavour, expected):
    pilots = pilots_of([blobs(3)], {"layers": layers, "flavour": flavour}, {"layers": 9})
    assert {i + 1 for i, m in enumerate(pilots.attention_masks) if m is not None} == expected


def max_pooled(masks, level):
    stride = SIZE[0] // LEVELS[level][0]
    return F.max_pool2d(masks.float()[:, None], stride)[:, 0].flatten(1).bool()


def nearest(masks, level):
    return F.interpolate(masks.float()[:, None], LEVELS[level], mode="nearest")[:, 0].flatten(1).bool()


@pytest.mark.parametrize("features", ["round_robin", "stride_8", "stride_16", "stride_32"])
def test_without_noise_pilots_see_their_object_at_the_level_of_the_layer(features):
    target = blobs(6)
    pilots = pilots_of([target], {"noise": {"kind": "none"}}, {"features": features, "layers": 5})
    fixed = {"stride_32": 0, "stride_16": 1, "stride_8": 2}.get(features)
    for index, masks in enumerate(pilots.attention_masks):
        level = index % 3 if fixed is None else fixed
        assert torch.equal(masks[0, :6], max_pooled(target.masks, level))
        # no object is lost, however small
        assert masks[0].any(1).all()


def test_noise_is_drawn_afresh_for_every_layer_and_group():
    pilots = pilots_of([blobs(3, seed=2)], {"noise": {"kind": "point", "ratio": 1.0}}, {"layers": 6})
    third, sixth = pilots.attention_masks[2][0], pilots.attention_masks[5][0]
    assert not torch.equal(third, sixth)
    assert not torch.equal(third[:3], third[3:6])


@pytest.mark.parametrize("kind", ["point", "shift", "scale"])
@pytest.mark.parametrize("flavour", ["paper", "released"])
def test_every_noise_kind_changes_the_masks(kind, flavour):
    pilot = {"noise": {"kind": kind, "ratio": 0.9}, "flavour": flavour, "complement": False}
    noised = pilots_of([blobs(6, seed=1)], pilot).attention_masks[2]
    plain = pilots_of([blobs(6, seed=1)], {**pilot, "noise": {"kind": "none"}}).attention_masks[2]
    assert not torch.equal(noised, plain)


def test_kinds_follow_each_other():
    both = [{"kind": "scale", "ratio": 0.5}, {"kind": "point", "ratio": 0.5}]
    one, two = (
        pilots_of([blobs(6, seed=1)], {"noise": n}, {"features": "stride_8"}).attention_masks[0]
        for n in (both[:1], both)
    )
    # the same scaling, then flips of at most half of each object
    flips = (one ^ two)[0].sum(1)
    assert flips.sum() > 0
    assert (flips <= one[0].sum(1) * 0.5).all()


def test_pilots_of_an_image_do_not_depend_on_its_batch():
    together = pilots_of([blobs(3), blobs(7, seed=5), blobs(1)])
    alone = pilots_of([blobs(3)])
    assert torch.equal(together.labels[0, :12], alone.labels[0])
    for a, b in zip(together.attention_masks, alone.attention_masks):
        assert torch.equal(a[0, :12], b[0])


# --- the released flavour -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "groups", "slots"),
    [([3, 7], 14, 98), ([1, 40], 2, 80), ([0, 5], 20, 100), ([0, 0], 0, 0), ([3, 101], 0, 0)],
)
def test_released_groups_follow_the_fullest_image(objects, groups, slots):
    layout = pilot_layout(objects, Pilot(flavour="released"))
    assert layout.groups == (groups, groups)
    assert layout.slots == slots
    assert layout.counts == tuple(groups * n for n in objects)


def test_released_padding_belongs_to_the_groups_of_its_image():
    pilots = pilots_of([blobs(2), blobs(5), blobs(0)], {"flavour": "released"})
    assert pilots.labels.shape == (3, 10)  # two groups of five
    assert pilots.counts == (4, 10, 0)
    for b in range(3):
        assert sorted(pilots.groups[b].tolist()) == [0] * 5 + [1] * 5
    assert (pilots.labels[0, 4:] == -1).all()
    assert not any(m[0, 4:].any() for m in pilots.attention_masks)


@pytest.mark.parametrize("kind", ["shift", "scale"])
def test_released_shift_and_scale_show_the_complement_from_layer_2_on(kind):
    target = blobs(6)
    released = {"noise": {"kind": kind, "ratio": 0.0}, "flavour": "released"}
    if kind == "scale":  # which enlarges by a cell even at 0
        released["scale"] = "paper"
    masks = pilots_of([target], released, {"layers": 9}).attention_masks
    for index, shown in enumerate(masks):
        wanted = nearest(target.masks, index % 3)
        assert torch.equal(shown[0, :6], wanted if index == 0 else ~wanted)


def test_released_point_noise_is_not_inverted():
    target = blobs(6)
    pilot = {"noise": {"kind": "point", "ratio": 0.0}, "flavour": "released"}
    for index, shown in enumerate(pilots_of([target], pilot).attention_masks):
        assert torch.equal(shown[0, :6], max_pooled(target.masks, index % 3))


def test_released_shift_is_drawn_once_for_all_layers():
    pilot = {"noise": {"kind": "shift", "ratio": 1.0}, "flavour": "released", "complement": False}
    masks = pilots_of([blobs(6)], pilot, {"layers": 9}).attention_masks
    assert torch.equal(masks[2], masks[5])
    assert torch.equal(masks[1].view(1, -1, 4, 6), masks[2].view(1, -1, 8, 12)[:, :, ::2, ::2])


@pytest.mark.parametrize("point", Pilot().rules().__dataclass_fields__)
def test_each_point_is_a_setting_of_its_own(point):
    paper, released = Pilot().rules(), Pilot(flavour="released").rules()
    assert getattr(paper, point) != getattr(released, point)
    mixed = Pilot(**{point: getattr(released, point)}).rules()
    assert {f for f in paper.__dataclass_fields__ if getattr(mixed, f) != getattr(paper, f)} == {point}
    back = Pilot(flavour="released", **{point: getattr(paper, point)}).rules()
    assert {f for f in paper.__dataclass_fields__ if getattr(back, f) != getattr(released, f)} == {point}


def test_settings_survive_being_written():
    for noise in ({"kind": "shift", "ratio": 0.1}, [{"kind": "shift"}, {"kind": "point", "ratio": 0.5}]):
        config = Config.model_validate({"model": {"pilot": {"noise": noise}}})
        assert Config.model_validate_json(config.model_dump_json()) == config
