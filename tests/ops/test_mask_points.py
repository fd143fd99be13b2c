"""The compiled mask losses against torch's operators in float64, for every instruction set that runs here."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mpformer.model.points import sample, unpack
from mpformer.ops import mask_points
from mpformer.ops.kernels import cpu_library
from mpformer.ops.mask_points import MaskPairs, Points, least_certain, mask_point_losses
from mpformer.ops.random_bits import random_bits_reference

LIBRARY = cpu_library(torch.zeros(1))
KERNELS = LIBRARY.usable if LIBRARY else []

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled CPU kernel")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each instruction set in turn."""
    monkeypatch.setattr(mask_points, "point_kernel", lambda _: LIBRARY.points_of(request.param))
    return request.param


SOME = Points(301, 93, 27)


def problem(points=SOME, limits=True):
    """Two heads of two images, six pairs; maps and masks of odd sizes."""
    random = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, 11, 17, generator=random) * 4 for _ in range(2)]
    masks = torch.rand(5, 37, 50, generator=random) < 0.4
    columns = [(0, 0, 3, 0), (0, 0, 0, 1), (0, 1, 2, 4), (1, 0, 4, 1), (1, 0, 1, 0), (1, 1, 0, 3)]
    table = torch.tensor([(*pair, row) for row, pair in enumerate(columns)], dtype=torch.int32)
    streams = torch.randint(-(2**31), 2**31, (6, 4), dtype=torch.int32, generator=random)
    ends = torch.tensor([[2.0, 2.0], [0.7, 0.9], [0.5, 2.0]])[[0, 1, 2, 0, 1, 2]]
    return maps, MaskPairs(table, masks, streams, ends if limits else None), points


def kept_points(logits, streams, points):
    """[n,important] packed: the least certain candidates, of equal ones the first."""
    candidates = random_bits_reference(streams, 0, points.candidates)
    distance = sample(logits, unpack(candidates)).abs()
    order = distance.sort(dim=1, stable=True).indices[:, : points.important]
    return candidates.gather(1, order)


def composed(maps, pairs, points):
    """The definition, in float64: cross-entropy and dice of each pair, [2,n]."""
    head, image, query, item, row = pairs.table.long().unbind(1)
    chosen = torch.stack([maps[h][b, q] for h, b, q in zip(head, image, query)])
    kept = kept_points(chosen, pairs.streams[row], points) if pairs.kept is None else pairs.kept[row]
    uniform = random_bits_reference(pairs.streams[row], 1, points.uniform)
    places = unpack(torch.cat((kept, uniform), 1))
    predicted, wanted = sample(chosen, places), sample(pairs.masks[item].double(), places)
    counted = torch.ones_like(predicted)
    if pairs.limits is not None:
        counted = (places < pairs.limits[:, None]).all(2).double()
    entropy = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none") * counted
    p, t = predicted.sigmoid() * counted, wanted * counted
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return torch.stack((entropy.sum(1) / counted.sum(1).clamp(min=1), dice))


def losses_and_gradients(function, maps):
    leaves = [one.detach().requires_grad_(True) for one in maps]
    losses = function(leaves)
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    (losses * weights).sum().backward()
    return losses.detach(), [leaf.grad for leaf in leaves]


def compiled(pairs, points):
    return lambda maps: torch.stack(mask_point_losses(maps, pairs, points))


def assert_right(maps, pairs, points):
    expected = losses_and_gradients(lambda x: composed(x, pairs, points), [one.double() for one in maps])
    got = losses_and_gradients(compiled(pairs, points), maps)
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    for mine, right in zip(got[1], expected[1]):
        torch.testing.assert_close(mine.double(), right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("important", [0, 1, 93, 301])
def test_losses_and_gradients(kernel, important):
    assert_right(*problem(Points(301, important, 27)))


@pytest.mark.parametrize("points", [Points(64, 20, 0), Points(5, 5, 130), Points(64, 64, 64)])
def test_any_number_of_points_without_limits(kernel, points):
    assert_right(*problem(points, limits=False))


def test_far_logits_neither_overflow_nor_vanish(kernel):
    maps, pairs, points = problem()
    maps = [one * 40 for one in maps]
    expected = composed([one.double() for one in maps], pairs, points)
    got, gradients = losses_and_gradients(compiled(pairs, points), maps)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_of_equally_uncertain_candidates_the_first_are_kept(kernel):
    """A flat map: all candidates tie, and the losses are those at the first ones."""
    _, pairs, _ = problem()
    flat = [torch.zeros(2, 5, 11, 17)] * 2
    many = mask_point_losses(flat, pairs, Points(301, 50, 27))
    few = mask_point_losses(flat, pairs, Points(50, 50, 27))
    assert all(torch.equal(a, b) for a, b in zip(many, few))


def test_the_kept_points_are_those_of_the_definition(kernel):
    maps, pairs, points = problem()
    logits = maps[0][0]
    got = least_certain(logits, pairs.streams[:5], points)
    expected = kept_points(logits, pairs.streams[:5], points)
    assert torch.equal(got.sort(1).values, expected.sort(1).values)


def test_a_part_of_a_head_and_half_precision_are_read_where_they_lie():
    maps, pairs, points = problem()
    wide = [torch.randn(2, 9, 11, 17) for _ in maps]
    for part, whole in zip(maps, wide):
        whole[:, 3:8] = part
    expected = losses_and_gradients(compiled(pairs, points), maps)
    got = losses_and_gradients(lambda x: compiled(pairs, points)([one[:, 3:8] for one in x]), wide)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a[:, 3:8], b) for a, b in zip(got[1], expected[1]))
    half = [one.bfloat16() for one in maps]
    rounded = losses_and_gradients(compiled(pairs, points), [one.float() for one in half])
    got = losses_and_gradients(compiled(pairs, points), half)
    assert torch.equal(got[0], rounded[0])
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16()) for a, b in zip(got[1], rounded[1]))


@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 1]])
def test_pairs_that_share_their_points_are_as_with_copies_of_them(kernel, rows):
    """Neighbours with the same object and points, and the same pairs in turn, to the last bit."""
    maps, pairs, points = problem()
    kept = random_bits_reference(pairs.streams[:3], 7, points.important)
    table = pairs.table.clone()
    table[:, 3] = table[:, 4] = torch.tensor(rows)
    sharing = replace(pairs, table=table, streams=pairs.streams[:3], kept=kept)
    assert_right(maps, sharing, points)
    own = table.clone()
    own[:, 4] = torch.arange(6)
    copies = replace(sharing, table=own, streams=pairs.streams[:3][rows], kept=kept[rows])
    results = [losses_and_gradients(compiled(p, points), maps) for p in (sharing, copies)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_the_bits_do_not_depend_on_the_threads():
    maps, pairs, points = problem()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(losses_and_gradients(compiled(pairs, points), maps))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_nothing_to_lose():
    maps, pairs, points = problem()
    none = replace(pairs, table=pairs.table[:0], streams=pairs.streams[:0], limits=pairs.limits[:0])
    losses, gradients = losses_and_gradients(compiled(none, points), maps)
    assert losses.shape == (2, 0)
    assert not any(gradient.any() for gradient in gradients)


def test_shapes_are_known_without_values():
    maps, pairs, points = problem()
    there = {name: value.to("meta") for name, value in pairs.__dict__.items() if value is not None}
    leaves = [one.to("meta").requires_grad_(True) for one in maps]
    losses = torch.stack(mask_point_losses(leaves, MaskPairs(**there), points))
    losses.sum().backward()
    assert losses.shape == (2, 6)
    assert leaves[1].grad.shape == maps[1].shape
