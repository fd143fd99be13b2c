"""Nothing of the pilots reaches the matching part, and no pilot reaches another group, image or padding."""

import pytest
import torch

from mpformer.model.architecture import build_model
from mpformer.types import InputError, Pilots
from tests.model.samples import blobs, draws_of, pilots_for, tiny_model

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_model({"layers": (1, 3)}), 3).double()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 255


def pilots_of(targets, pilot=None, seed=0):
    config = tiny_model({"layers": (1, 3), **(pilot or {})})
    return pilots_for(targets, config, draws_of(len(targets), seed))


TARGETS = [blobs(3), blobs(0), blobs(5, seed=1)]


def matching_result(model, images, pilots):
    """Matching part's outputs, and the gradients of a function of them alone."""
    model.zero_grad(set_to_none=True)
    out = model(images, pilots, all_heads=True)
    values = [v for h in out.heads for v in (h.class_logits, h.mask_logits)]
    sum((v * v).sum() for v in values).backward()
    gradients = {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None and "pilot_embed" not in n
    }
    return [v.detach() for v in values], gradients


def largest_difference(a, b):
    values = max(float((x - y).abs().max()) for x, y in zip(a[0], b[0]))
    relative = max(float((a[1][n] - b[1][n]).abs().max() / (1 + b[1][n].abs().max())) for n in b[1])
    return values, relative


def test_matching_part_is_bit_equal_whatever_the_pilots_are(model, images):
    base = matching_result(model, images, pilots_of(TARGETS))
    noisier = {
        "noise": [{"kind": "shift", "ratio": 1.0}, {"kind": "point", "ratio": 0.9}],
        "label_noise": 1.0,
    }
    for other in (pilots_of(TARGETS, seed=7), pilots_of(TARGETS, noisier)):
        changed = matching_result(model, images, other)
        assert all(torch.equal(x, y) for x, y in zip(base[0], changed[0]))
        assert all(torch.equal(base[1][n], changed[1][n]) for n in base[1])
        assert set(base[1]) == set(changed[1])


def test_matching_part_is_the_same_with_any_number_of_pilots(model, images):
    base = matching_result(model, images, None)
    for queries in (3, 12, 40):
        values, gradients = largest_difference(
            matching_result(model, images, pilots_of(TARGETS, {"queries": queries})), base
        )
        assert values < 1e-11
        assert gradients < 1e-11


def pilot_outputs(model, images, pilots):
    with torch.no_grad():
        out = model(images, pilots)
    return [v for h in out.pilots for v in (h.class_logits, h.mask_logits)]


def test_pilots_do_not_depend_on_their_batch_neighbours(model, images):
    """Nor, with more neighbours' objects, on the number of padding slots."""
    alone = pilot_outputs(model, images[:1], pilots_of(TARGETS[:1], {"queries": 7}))
    slots = alone[0].shape[1]
    for neighbours in ([TARGETS[0], blobs(0), blobs(7, seed=2)], [TARGETS[0], blobs(7, seed=3), blobs(1)]):
        together = pilot_outputs(model, images, pilots_of(neighbours, {"queries": 7}))
        assert together[0].shape[1] > slots
        for a, b in zip(alone, together):
            assert float((a[0] - b[0, :slots]).abs().max()) < 1e-12


def test_pilots_do_not_see_other_groups(model, images):
    pilots = pilots_of(TARGETS[:1], {"queries": 12})
    assert int(pilots.groups.max()) == 3
    base = pilot_outputs(model, images[:1], pilots)
    second = pilots.groups[0] == 1
    labels = torch.where(second, 2 - pilots.labels, pilots.labels)
    masks = tuple(None if m is None else m ^ second[None, :, None] for m in pilots.attention_masks)
    changed = pilot_outputs(
        model, images[:1], Pilots(labels, pilots.objects, pilots.groups, pilots.counts, masks)
    )
    for a, b in zip(base, changed):
        assert float((a[0, ~second] - b[0, ~second]).abs().max()) < 1e-12
    assert float((base[-1][0, second] - changed[-1][0, second]).abs().max()) > 1e-3


def test_pilots_do_see_the_matching_part_and_their_own_group(model, images):
    """The rules above are not kept by pilots that see nothing at all."""
    pilots = pilots_of(TARGETS[:1], {"queries": 12})
    base = pilot_outputs(model, images[:1], pilots)
    labels = pilots.labels.clone()
    labels[0, 0] = (labels[0, 0] + 1) % 3
    changed = pilot_outputs(
        model,
        images[:1],
        Pilots(labels, pilots.objects, pilots.groups, pilots.counts, pilots.attention_masks),
    )
    assert float((base[-1][0, 1] - changed[-1][0, 1]).abs().max()) > 1e-6
    kept = model.decoder.query_feat.weight.detach().clone()
    with torch.no_grad():
        model.decoder.query_feat.weight.neg_()  # not a shift, which a LayerNorm takes away again
    moved = pilot_outputs(model, images[:1], pilots)
    with torch.no_grad():
        model.decoder.query_feat.weight.copy_(kept)
    assert float((base[-1] - moved[-1]).abs().max()) > 1e-6


def test_released_padding_is_seen_by_its_group(model, images):
    """The leak of the released code is there when it is asked for: a neighbour's objects change a pilot."""
    released = {"queries": 12, "padded_slots": "trained", "noise": {"kind": "none"}, "label_noise": 0.0}
    fewer = pilot_outputs(
        model, images[:2], pilots_of([blobs(3), blobs(4)], {**released, "groups": "per_batch"})
    )
    more = pilot_outputs(
        model, images[:2], pilots_of([blobs(3), blobs(6)], {**released, "groups": "per_batch"})
    )
    assert float((fewer[-1][0, :3] - more[-1][0, :3]).abs().max()) > 1e-9


def test_in_inference_piloted_and_plain_model_are_the_same_function(model, images):
    plain = build_model(tiny_model({"queries": 0}), 3).double()
    state = {k: v for k, v in model.state_dict().items() if "pilot_embed" not in k}
    plain.load_state_dict(state)
    with torch.no_grad():
        a, b = model.eval()(images), plain.eval()(images)
    model.train()
    assert len(a.heads) == len(b.heads) == 1
    assert a.pilots is None
    assert torch.equal(a.heads[0].mask_logits, b.heads[0].mask_logits)
    assert torch.equal(a.heads[0].class_logits, b.heads[0].class_logits)
    with pytest.raises(InputError, match=r"model\.pilot\.queries is 0"):
        plain(images, pilots_of(TARGETS))
