"""Batches copied ahead, with a GPU's streams replaced by ones that note what is asked of them."""

import contextlib
import threading

import pytest
import torch

from mpformer.train import ahead
from mpformer.types import InputError, PackedBatch, PackedTarget

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def packed(step: int) -> PackedBatch:
    bits = torch.full((2, 32, 4), 0b10100000, dtype=torch.uint8)
    images = torch.full((1, 3, 32, 32), step, dtype=torch.uint8)
    target = PackedTarget(torch.tensor([0, 1]), bits)
    return PackedBatch(images, (target,), ((32, 32),), (f"image-{step}",), (step,), (f"skipped {step}",))


class FakeCuda:
    """`torch.cuda` with streams that note, in the order of the host's calls, what is queued on them."""

    def __init__(self, monkeypatch):
        self.queued: list[tuple] = []
        self._current = threading.local()
        fake = self

        class Stream:
            def __init__(self, device):
                self.name = f"side of {device}"

            def wait_event(self, event):
                fake.note("wait", self.name, event.number)

        class Event:
            def record(self, stream):
                self.number = sum(kind == "event" for kind, *_ in fake.queued)
                fake.note("event", stream.name, self.number)

        main = Stream("none")
        main.name = "main"
        self.current = lambda: getattr(self._current, "stream", main)

        @contextlib.contextmanager
        def stream(of):
            before, self._current.stream = self.current(), of
            yield
            self._current.stream = before

        to = PackedBatch.to

        def copied(batch, device, non_blocking=False):
            assert (device, non_blocking) == (GPU, True)
            fake.note("copy", fake.current().name, batch.image_ids)
            return to(batch, "cpu")

        def pinned(batch):
            fake.note("pin", fake.current().name, batch.image_ids)
            return batch

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current())
        monkeypatch.setattr(PackedBatch, "to", copied)
        monkeypatch.setattr(PackedBatch, "pin_memory", pinned)
        kept = lambda tensor, stream: fake.note("keep for", stream.name, tuple(tensor.shape))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", kept, raising=False)

    def note(self, *what):
        self.queued.append(what)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_batch_is_copied_on_a_stream_of_its_own_and_waited_for_by_the_step(cuda):
    ((batch, skipped),) = ahead.on_device(iter([packed(7)]), GPU)
    assert skipped == ("skipped 7",)
    assert batch.images.unique().tolist() == [7]
    assert batch.targets[0].masks[0, 0, :4].tolist() == [True, False, True, False]
    side = "side of cuda:0"
    assert cuda.queued == [
        ("pin", side, ("image-7",)),
        ("copy", side, ("image-7",)),
        ("event", side, 0),
        ("wait", "main", 0),
        ("keep for", "main", (1, 3, 32, 32)),
        ("keep for", "main", (2,)),
        ("keep for", "main", (2, 32, 32)),
    ]


@pytest.mark.usefixtures("cuda")
def test_the_next_batch_is_fetched_while_a_step_runs():
    asked = [threading.Event() for _ in range(4)]

    def stream():
        for step in range(3):
            asked[step].set()
            yield packed(step)
        asked[3].set()

    for step, (batch, _) in enumerate(ahead.on_device(stream(), GPU)):
        assert batch.positions == (step,)
        # the step runs until the next batch has been asked for: without a fetch ahead, for ever
        assert asked[step + 1].wait(timeout=60)
        assert not any(event.is_set() for event in asked[step + 2 :])


@pytest.mark.usefixtures("cuda")
def test_a_bad_sample_is_raised_at_its_step():
    def stream():
        yield packed(0)
        raise InputError("image-1: unreadable")

    batches = ahead.on_device(stream(), GPU)
    batch, _ = next(batches)
    assert batch.positions == (0,)
    with pytest.raises(InputError, match="image-1"):
        next(batches)


def test_on_a_cpu_nothing_is_fetched_ahead():
    asked = []

    def stream():
        for step in range(2):
            asked.append(step)
            yield packed(step)

    for step, (batch, skipped) in enumerate(ahead.on_device(stream(), CPU)):
        assert asked == list(range(step + 1))
        assert batch.positions == (step,)
        assert skipped == (f"skipped {step}",)


def test_a_step_that_fails_does_not_wait_for_the_next_batch(monkeypatch):
    """The loader may be stuck."""
    FakeCuda(monkeypatch)
    release = threading.Event()

    def batches():
        yield packed(0)
        release.wait(60)
        yield packed(1)

    source = ahead.on_device(batches(), GPU)
    next(source)
    closed = threading.Thread(target=source.close, daemon=True)
    closed.start()
    closed.join(20)
    stuck = closed.is_alive()
    release.set()
    assert not stuck
