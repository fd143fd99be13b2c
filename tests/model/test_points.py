"""Point sampling against loops."""

import math

import pytest
import torch

from mpformer.model.points import (
    cell_centers,
    inside,
    least_certain,
    sample,
    sample_masks,
    sample_shared,
    unpack,
)


def bilinear(values, x, y):
    """The value of a map at (x, y) in 0..1, zero outside, by the definition."""
    height, width = values.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < height and 0 <= c < width:
                total += float(values[r, c]) * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def test_sample_is_bilinear_with_zero_outside():
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 7, dtype=torch.float64, generator=random)
    points = torch.rand(2, 40, 2, dtype=torch.float64, generator=random) * 1.2 - 0.1
    values = sample(maps, points)
    for n in range(2):
        for p, (x, y) in enumerate(points[n].tolist()):
            assert float(values[n, p]) == pytest.approx(bilinear(maps[n], x, y), abs=1e-12)


def test_sample_of_nothing_keeps_the_graph():
    maps = torch.randn(0, 4, 4, requires_grad=True)
    sample(maps, torch.rand(0, 9, 2)).sum().backward()
    assert maps.grad is not None


def test_cell_centers_read_each_cell():
    maps = torch.arange(12, dtype=torch.float64).view(1, 3, 4)
    assert torch.allclose(sample(maps, cell_centers((3, 4), maps.device)[None]), maps.flatten(1), atol=1e-5)


def test_the_least_certain_candidates():
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 8, 8, generator=random)
    candidates = torch.rand(3, 30, 2, generator=random)
    points = least_certain(logits, candidates, 6)
    assert points.shape == (3, 6, 2)
    for n in range(3):
        certainty = [abs(bilinear(logits[n], x, y)) for x, y in candidates[n].tolist()]
        best = sorted(range(30), key=certainty.__getitem__)[:6]
        assert {tuple(p) for p in points[n].tolist()} == {tuple(candidates[n, i].tolist()) for i in best}


@pytest.mark.parametrize("size", [(9, 33), (1, 1), (16, 16)])
def test_sampled_masks_are_those_of_their_copies(size):
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(4, *size, generator=random) < 0.5
    rows = torch.tensor([2, 0, 2, 3, 1, 2])
    points = 1.4 * torch.rand(6, 50, 2, generator=random, dtype=torch.float64) - 0.2  # some lie outside
    expected = sample(masks[rows].double(), points)
    torch.testing.assert_close(sample_masks(masks, rows, points), expected, atol=1e-12, rtol=0)


def test_inside_is_the_unpadded_corner():
    points = torch.tensor([[0.49, 0.7], [0.51, 0.1], [0.1, 0.76], [0.0, 0.0]])
    assert inside(points, torch.tensor([32 / 64, 48 / 64])).tolist() == [True, False, False, True]


def test_a_packed_point_is_the_centre_of_its_unit():
    ends = torch.tensor([0, 0xFFFF, -65536, -1, 3 + (2 << 16)], dtype=torch.int32)
    expected = [[0.5, 0.5], [65535.5, 0.5], [0.5, 65535.5], [65535.5, 65535.5], [3.5, 2.5]]
    assert (unpack(ends) * 65536).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "size"), [(7, (9, 33)), (1, (1, 1)), (100, (16, 16))])
@pytest.mark.parametrize(("images", "threads"), [(3, 1), (1, 2), (2, 5)])
def test_maps_that_share_their_points_have_the_values_of_each_alone(
    dtype, count, size, images, threads, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(images, count, *size, generator=random, dtype=dtype)
    points = 1.2 * torch.rand(images, 50, 2, generator=random) - 0.1  # some lie outside
    each = [sample(of_image, at.expand(count, -1, -1)) for of_image, at in zip(maps, points)]
    torch.testing.assert_close(sample_shared(maps, points), torch.stack(each))
    assert sample_shared(maps[:, :0], points).shape == (images, 0, 50)
