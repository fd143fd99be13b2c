"""Mask losses on sampled points by their definition, in float64, pair by pair; and problems to solve."""

import torch
from torch.nn import functional as F

from mpformer.ops.mask_points import MaskPairs
from mpformer.ops.random_bits import random_bits_reference

# Relative error in the Euclidean norm that rounding a gradient to its type may make.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def problem(
    dtype=torch.float32,
    *,
    heads=2,
    queries=5,
    size=(11, 17),
    pairs=7,
    limits=False,
    given=0,
    scale=4.0,
    device="cpu",
):
    """Maps of two images and `pairs` pairs, some of which share streams; given: points that are kept."""
    random = torch.Generator().manual_seed(0)
    maps = [(torch.randn(2, queries, *size, generator=random) * scale).to(dtype) for _ in range(heads)]
    place = torch.randperm(heads * 2 * queries, generator=random)[:pairs]
    rows = torch.arange(pairs).clamp(max=max(pairs - 3, 0))
    objects = torch.randint(0, 4, (pairs,), generator=random)
    table = torch.stack((place // queries // 2, place // queries % 2, place % queries, objects, rows), dim=1)
    masks = torch.rand(4, 37, 50, generator=random) < 0.4
    streams = integers(int(rows.max()) + 1, 4, generator=random)
    places = torch.rand(pairs, 2, generator=random) * 0.6 + 0.4 if limits else None
    kept = integers(len(streams), given, generator=random) if given else None
    tensors = (table.int(), masks, streams, places, kept)
    return (
        [one.to(device) for one in maps],
        MaskPairs(*(None if t is None else t.to(device) for t in tensors)),
    )


def integers(*shape, generator=None):
    """Random int32, all bits."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def weights(pairs):
    """The gradient of the losses [2,n] that the tests use."""
    count = len(pairs.table)
    return torch.linspace(-1, 2, 2 * count, device=pairs.table.device).view(2, count)


def look_up(maps, points):
    """[H,W] and packed points [n] -> [n] float64: bilinear, zero outside."""
    at = torch.stack((points & 0xFFFF, points >> 16 & 0xFFFF), dim=1).double()
    grid = 2 * (at + 0.5) / 65536 - 1
    return F.grid_sample(maps.double()[None, None], grid[None, None], align_corners=False)[0, 0, 0]


def exact_choice(one, stream, points):
    """The kept candidates of a map [H,W], packed: the least certain, of equal ones the first, in order."""
    candidates = random_bits_reference(stream[None], 0, points.candidates)[0]
    order = look_up(one, candidates).abs().argsort(stable=True)
    return candidates[order[: points.important].sort().values]


def exact(maps, pairs, points, chosen, grad):
    """Losses [2,n], sums [n,5] and gradients of the maps, given the kept points and that of the losses."""
    maps = [one.detach().double().requires_grad_() for one in maps]
    losses, sums = [], []
    for i, (number, image, query, thing, row) in enumerate(pairs.table.tolist()):
        kept = chosen[i] if pairs.kept is None else pairs.kept[row]
        at = torch.cat((kept, random_bits_reference(pairs.streams[row : row + 1], 1, points.uniform)[0]))
        logits, truth = look_up(maps[number][image, query], at), look_up(pairs.masks[thing], at)
        counted = torch.ones_like(truth)
        if pairs.limits is not None:
            where = (torch.stack((at & 0xFFFF, at >> 16 & 0xFFFF), dim=1) + 0.5) / 65536
            counted = (where < pairs.limits[i]).all(1).double()
        entropy = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * counted).sum()
        p, t = logits.sigmoid() * counted, truth * counted
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        losses.append(torch.stack((entropy / counted.sum().clamp(min=1), dice)))
        sums.append(torch.stack((counted.sum(), entropy, p.sum(), t.sum(), (p * t).sum())))
    losses = torch.stack(losses, dim=1)
    grads = torch.autograd.grad((losses * grad).sum(), maps, materialize_grads=True)
    return losses.detach(), torch.stack(sums).detach(), grads


def check(kernel, maps, pairs, points, *, choice=True):
    """Forward and backward of a kernel against `exact`; choice: compare the kept points, too."""
    losses, sums, chosen = kernel.forward(maps, pairs, points)
    if pairs.kept is None:
        assert chosen.shape == (len(pairs.table), points.important)
        if choice:
            for i, (number, image, query, _, row) in enumerate(pairs.table.tolist()):
                wanted = exact_choice(maps[number][image, query], pairs.streams[row], points)
                assert torch.equal(chosen[i], wanted)
    else:
        assert chosen.shape == (0, points.important)
    grad = weights(pairs)
    grads = kernel.backward(grad, maps, pairs, points, sums, chosen)
    expected = exact(maps, pairs, points, chosen, grad)
    assert losses.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.double(), expected[1], rtol=1e-5, atol=1e-6)
    tolerance = TOLERANCE[maps[0].dtype] + max(maps[0].shape[2:]) * 2**-24  # of the place in a map
    for one, got, wanted in zip(maps, grads, expected[2], strict=True):
        assert got.dtype == one.dtype
        assert got.shape == one.shape
        assert got.is_contiguous()
        assert ((got.double() - wanted).norm() <= tolerance * wanted.norm()).item()
    without = torch.ones(len(maps), *maps[0].shape[:2], dtype=torch.bool, device=maps[0].device)
    without[tuple(pairs.table[:, :3].T.long())] = False
    for one, free in zip(grads, without, strict=True):
        assert not one[free].any()
    return losses, sums, chosen, grads
