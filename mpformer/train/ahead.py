"""Batches on their device one step ahead: while a step runs, the batch of the next one is fetched and copied.

The copy is made from pinned memory on a CUDA stream of its own, so that neither the host nor the step waits
for it; the step's stream waits for the event that ends it. The next batch takes device memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor

from mpformer.types import Batch, PackedBatch

_Result = TypeVar("_Result")


def on_device(packed: Iterator[PackedBatch], device: torch.device) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """The batches on a device in their order, each with the notes of samples that it had to skip.

    On a GPU one is fetched and copied ahead, in a thread of its own, which pinning keeps busy. What the
    iterator raises is raised where its batch is due, not ahead. On a CPU there is nothing to copy.
    """
    if device.type != "cuda":
        for batch in packed:
            yield batch.to(device), batch.skipped
        return
    copies = CopyStream(device)

    def fetch() -> tuple[_OnItsWay, tuple[str, ...]] | None:
        batch = next(packed, None)
        return None if batch is None else (copies.send(batch), batch.skipped)

    upcoming = _started(fetch)
    while (fetched := upcoming.result()) is not None:
        upcoming = _started(fetch)
        sent, skipped = fetched
        yield copies.receive(sent), skipped


def _started(work: Callable[[], _Result]) -> Future[_Result]:
    """Work in a thread that nobody waits for: a step that fails must not wait for a loader that is stuck."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  (raised again where the result is asked for)
            future.set_exception(error)

    Thread(target=run, name="ahead", daemon=True).start()
    return future


class _OnItsWay:
    """A batch whose copy has been queued: to be used after `arrived`."""

    def __init__(self, batch: Batch, arrived: torch.cuda.Event) -> None:
        self.batch, self.arrived = batch, arrived


class CopyStream:
    """A stream of its own for copies to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, packed: PackedBatch) -> _OnItsWay:
        """Queue the copy of a batch and the unpacking of its masks; the device is not waited for."""
        with torch.cuda.stream(self._stream):  # of this device: a thread begins on the first one
            batch = packed.pin_memory().to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _OnItsWay(batch, arrived)

    def receive(self, sent: _OnItsWay) -> Batch:
        """The batch for the current stream, which waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent.arrived)
        for tensor in _tensors(sent.batch):
            # its memory belongs to the other stream, which may use it again once this one is done with it
            tensor.record_stream(current)
        return sent.batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield batch.images
    for target in batch.targets:
        yield target.labels
        yield target.masks
