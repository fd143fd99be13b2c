"""Mask losses and random numbers on a GPU: against float64, the same bits in every run, memory, streams."""

import dataclasses

import pytest
import torch

from mpformer.ops.kernels import point_kernel
from mpformer.ops.mask_points import MaskPairs, Points, least_certain, mask_point_losses
from mpformer.ops.random_bits import random_bits, random_bits_reference
from tests.ops.mask_points_exact import TOLERANCE, check, exact, integers, look_up, problem, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SOME = Points(candidates=301, important=93, uniform=27)
USUAL = Points(candidates=37_632, important=9_408, uniform=3_136)


@pytest.fixture
def kernel():
    """All of this file is about the compiled kernels: the plain path passing would prove nothing."""
    found = point_kernel(torch.zeros(1, device="cuda"))
    if found is None:
        pytest.skip("no compiled CUDA kernel")
    return found


def usual(dtype, pairs):
    """Maps of 256 x 256 as a model makes them, smooth, and masks of 1024 x 1024; 8 heads of 2 images."""
    random = torch.Generator("cuda").manual_seed(0)
    coarse = torch.randn(16, 100, 16, 16, device="cuda", generator=random) * 4
    queries = -(-pairs // 16)
    smooth = torch.nn.functional.interpolate(coarse[:, :queries], (256, 256), mode="bilinear")
    maps = list(smooth.to(dtype).unflatten(0, (8, 2)))
    number = torch.randperm(8 * 2 * queries, device="cuda", generator=random)[:pairs]
    masks = torch.rand(20, 1, 64, 64, device="cuda", generator=random)
    masks = torch.nn.functional.interpolate(masks, (1024, 1024), mode="bilinear")[:, 0] > 0.5
    row = torch.arange(pairs, device="cuda")
    columns = (number // queries // 2, number // queries % 2, number % queries, row % 20, row)
    streams = integers(pairs, 4, generator=torch.Generator().manual_seed(1)).cuda()
    return maps, MaskPairs(torch.stack(columns, dim=1).int(), masks, streams)


@pytest.mark.parametrize(
    ("rows", "call", "count"), [(1, 0, 1), (3, 1, 4100), (1000, 7, 2051), (2, 2**31 - 1, 8)]
)
def test_random_bits(kernel, rows, call, count):
    streams = integers(rows, 4, generator=torch.Generator().manual_seed(rows))
    expected = random_bits_reference(streams, call, count)
    assert torch.equal(random_bits(streams.cuda(), call, count).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(11, 17), (1, 1), (12, 16), (300, 275)])
@pytest.mark.parametrize("important", [0, 93, 301])
def test_losses_and_gradients(kernel, dtype, size, important):
    maps, pairs = problem(dtype, size=size, device="cuda")
    check(kernel, maps, pairs, dataclasses.replace(SOME, important=important))


@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("given", [0, 70])
def test_points_that_are_given_and_points_that_do_not_count(kernel, given, limits):
    check(kernel, *problem(limits=limits, given=given, device="cuda"), Points(301, given or 70, 30))


def test_slices_are_read_where_they_lie(kernel):
    maps, pairs = problem(torch.bfloat16, size=(7, 13), device="cuda")
    wide = torch.zeros(2, 9, 7, 13, dtype=torch.bfloat16, device="cuda")
    wide[:, 3:8] = maps[0]
    expected, got = check(kernel, maps, pairs, SOME), check(kernel, [wide[:, 3:8], maps[1]], pairs, SOME)
    assert all(torch.equal(a, b) for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3])))


def test_far_logits_neither_overflow_nor_vanish(kernel):
    *_, grads = check(kernel, *problem(scale=160.0, device="cuda"), SOME)
    assert all(grad.isfinite().all() for grad in grads)


def test_what_is_not_a_number_stays_in_its_pair(kernel):
    maps, pairs = problem(device="cuda")
    number, image, query = pairs.table[2, :3].tolist()
    maps[number][image, query, 5] = float("nan")
    losses, sums, chosen = kernel.forward(maps, pairs, SOME)
    assert losses.isnan().any(0).nonzero().flatten().tolist() == [2]
    grads = kernel.backward(weights(pairs), maps, pairs, SOME, sums, chosen)
    where = torch.stack([one.isnan().all(3).all(2) for one in grads])
    assert where.nonzero().tolist() == [[number, image, query]]
    assert sum(int(one.isnan().sum()) for one in grads) == maps[0][0, 0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_pairs_of_the_usual_size(kernel, dtype):
    """1,568 pairs: the same bits in every run, a few of them against float64."""
    maps, pairs = usual(dtype, 1568)
    grad = weights(pairs)
    runs = []
    for _ in range(3):
        found = kernel.forward(maps, pairs, USUAL)
        runs.append((*found, *kernel.backward(grad, maps, pairs, USUAL, *found[1:])))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    losses, sums, chosen, *grads = runs[0]
    few = list(range(0, 1568, 200))
    table = pairs.table[few]
    for i, (number, image, query, _, row) in zip(few, table.tolist(), strict=True):
        candidates = random_bits_reference(pairs.streams[row : row + 1], 0, USUAL.candidates)[0]
        distance = look_up(maps[number][image, query], candidates).abs()
        last = distance.sort().values[USUAL.important - 1]
        kept = look_up(maps[number][image, query], chosen[i]).abs()
        # within the rounding of a look-up in float32 the choice is any
        assert kept.max() <= last + 1e-5
        assert set(candidates[distance < last - 1e-5].tolist()) <= set(chosen[i].tolist())
    part = dataclasses.replace(pairs, table=table)
    expected = exact(maps, part, USUAL, chosen[few], grad[:, few])
    torch.testing.assert_close(losses[:, few].double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums[few].double(), expected[1], rtol=1e-5, atol=1e-6)
    for number, image, query in table[:, :3].tolist():
        got, wanted = (of[number][image, query].double() for of in (grads, expected[2]))
        assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_memory(kernel):
    """Beside the results nothing is allocated."""
    maps, pairs = usual(torch.bfloat16, 320)
    found = kernel.forward(maps, pairs, USUAL)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = kernel.backward(weights(pairs), maps, pairs, USUAL, *found[1:])
    results = sum(one.numel() * one.element_size() for one in grads)
    assert torch.cuda.max_memory_allocated() - before <= results + 2**20


def test_operators_streams_and_graphs(kernel):
    """Through autograd, on a side stream after work there that the maps depend on, and captured."""
    maps, pairs = problem(device="cuda")
    wanted = check(kernel, maps, pairs, SOME)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        inputs = [(one * 2 / 2).requires_grad_() for one in maps]
        losses = torch.stack(mask_point_losses(inputs, pairs, SOME))
        grads = torch.autograd.grad((losses * weights(pairs)).sum(), inputs)
    stream.synchronize()
    assert torch.equal(losses, wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted[3], strict=True))
    number, image, query, _, row = pairs.table[0].tolist()
    kept = least_certain(maps[number][image, query][None], pairs.streams[row : row + 1], SOME)
    assert torch.equal(kept[0], wanted[2][0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.forward(maps, pairs, SOME)
    for one in captured:
        one.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted[:3]))
