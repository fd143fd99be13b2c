"""Batches copied ahead on a GPU: the right bytes, also while both streams are busy and memory is scarce."""

import pytest
import torch

from mpformer.train.ahead import on_device
from tests.train.test_ahead import packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_batches_are_right_while_the_step_is_behind():
    """The host runs ahead of the device: memory must not be given away before the step has read it."""
    device, sums = torch.device("cuda", torch.cuda.current_device()), []
    for batch, _ in on_device(map(packed, range(1, 20)), device):
        torch.cuda._sleep(5_000_000)
        sums.append((batch.images.long().sum(), batch.targets[0].masks.sum()))
        del batch
    for step, (pixels, cells) in enumerate(sums, start=1):
        assert int(pixels) == step * 3 * 32 * 32
        assert int(cells) == 2 * 32 * 4 * 2


def test_the_host_does_not_wait_for_a_batch():
    device = torch.device("cuda", torch.cuda.current_device())
    batches = on_device(map(packed, range(3)), device)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch, _ = next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.positions == (1,)
