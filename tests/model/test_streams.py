"""Random numbers that belong to seed, purpose, position, place and row, whatever else is in the batch."""

import numpy as np
import pytest
import torch

from mpformer.model.streams import SampleRandom

CPU = torch.device("cpu")


def draws(seed=0, purpose="losses", position=17, row=3, place=2):
    """Numbers for one row of an image that stands between two others."""
    source = SampleRandom(seed, (5, position, 9), CPU)
    return source.rows(purpose, np.array([1]), np.array([row]), np.array([place]))


def test_a_row_has_the_same_numbers_beside_others():
    images, rows = np.array([0, 1, 1, 2]), np.array([3, 1, 3, 3])
    together = SampleRandom(0, (5, 17, 9), CPU).rows("losses", images, rows, 2)
    alone = SampleRandom(0, (17,), CPU).rows("losses", np.array([0]), np.array([3]), 2)
    for shape in ((4, 2), (), (7,)):
        assert torch.equal(together.uniform(*shape)[2:3], alone.uniform(*shape))
    assert torch.equal(together.points(9)[2:3], alone.points(9))
    assert len(together) == 4


def test_all_that_makes_a_row_gives_other_numbers():
    keys = [
        {},
        {"seed": 1},
        {"purpose": "matching"},
        {"position": 18},
        {"row": 4},
        {"place": 3},
        {"row": 2, "place": 3},
        {"place": 2**20},
    ]
    numbers = [draws(**key).uniform(64)[0] for key in keys]
    assert torch.equal(numbers[0], draws().uniform(64)[0])
    for i, first in enumerate(numbers):
        for second in numbers[i + 1 :]:
            # equal by chance with probability 2^-24 for each of them
            assert int((first == second).sum()) <= 1


def test_calls_give_fresh_numbers_and_a_selection_starts_anew():
    source = draws()
    first, second = source.uniform(100), source.uniform(100)
    assert not torch.equal(first, second)
    assert torch.equal(source.some(torch.tensor([0, 0])).uniform(100), first.expand(2, -1))


@pytest.mark.parametrize("purpose", ["losses", "pilot noise"])
def test_numbers_are_uniform(purpose):
    """Mean, variance and the counts of 64 bins, over rows, places and images together."""
    images, rows = np.repeat(np.arange(8), 32), np.tile(np.arange(32), 8)
    numbers = SampleRandom(3, range(8), CPU).rows(purpose, images, rows, rows % 5).uniform(501)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    count = numbers.numel()
    assert abs(float(numbers.double().mean()) - 0.5) < 4 * (1 / 12 / count) ** 0.5
    bins = torch.bincount((numbers * 64).long().flatten(), minlength=64).double()
    chi_squared = float(((bins - count / 64) ** 2 / (count / 64)).sum())
    assert chi_squared < 63 + 4 * (2 * 63) ** 0.5


def test_neighbours_do_not_resemble_each_other():
    """Correlations of rows, places, positions, calls and of neighbouring numbers are those of chance."""
    length, limit = 4000, 4 / 4000**0.5
    base = draws()
    first, second = (base.uniform(length)[0] for _ in range(2))
    others = [
        second,
        *(draws(**key).uniform(length)[0] for key in ({"row": 4}, {"place": 3}, {"position": 18})),
    ]
    others.append(first.roll(1))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((first, other)))[0, 1])) < limit


def test_points_are_uniform_in_both_directions():
    source = SampleRandom(0, (0,), CPU).rows("losses", np.zeros(3, int), np.arange(3), 0)
    points = source.points(5001)
    assert points.shape == (3, 5001, 2)
    assert points.dtype == torch.float32
    assert float(points.min()) > 0
    assert float(points.max()) < 1
    cells = (points * 4).long()
    counts = torch.bincount((cells[..., 1] * 4 + cells[..., 0]).flatten(), minlength=16).double()
    expected = 3 * 5001 / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 15 + 4 * 30**0.5
