"""One random stream per image: whatever else is in the batch."""

import torch

from mpformer.model.points import unpack
from mpformer.model.streams import SampleRandom

CPU = torch.device("cpu")


def test_a_stream_belongs_to_seed_purpose_and_position():
    alone = SampleRandom(3, "pilots", (17,), CPU).uniform(0, 4, 2)
    together = SampleRandom(3, "pilots", (5, 17, 9), CPU)
    together.uniform(0, 100)  # what others draw does not matter
    assert torch.equal(together.uniform(1, 4, 2), alone)
    others = [
        SampleRandom(4, "pilots", (17,), CPU),
        SampleRandom(3, "matching", (17,), CPU),
        SampleRandom(3, "pilots", (18,), CPU),
    ]
    assert all(not torch.equal(o.uniform(0, 4, 2), alone) for o in others)


def test_draws_are_fresh_and_uniform():
    draws = SampleRandom(0, "matching", (0,), CPU)
    first, second = draws.uniform(0, 5000), draws.uniform(0, 5000)
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 0.5) < 0.02
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    assert sorted(draws.permutation(0, 9).tolist()) == list(range(9))


def test_points_are_uniform_in_both_directions():
    draws = SampleRandom(0, "matching", (0,), CPU)
    first, second = draws.points(0, 3, 5001), draws.points(0, 3, 5001)
    assert first.shape == (3, 5001)
    assert first.dtype == torch.int32
    assert not torch.equal(first, second)
    cells = (unpack(first) * 4).long()
    counts = torch.bincount((cells[..., 1] * 4 + cells[..., 0]).flatten(), minlength=16)
    assert len(counts) == 16
    assert float((counts / first.numel() - 1 / 16).abs().max()) < 0.01
