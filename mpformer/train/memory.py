"""Out of memory, in one line: the phase, the images, and the setting that helps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from mpformer.config import Config
from mpformer.train.timing import Timers
from mpformer.types import Batch, RunError, printable

_EXHAUSTED = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED",
    re.IGNORECASE,
)
"""In messages of CUDA, of torch's allocators and of cuBLAS, which raise no class of their own everywhere."""
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.I)
_MOST_IMAGES = 8
"""Image ids that the line names."""


@contextlib.contextmanager
def explained(timers: Timers, config: Config, batch: Batch | None = None) -> Iterator[None]:
    """Raise `RunError`, in the words of `out_of_memory`, where memory is exhausted while the body runs."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, timers.phase, batch, config) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory of the device or of the host is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)) is not None


def out_of_memory(error: Exception, phase: str, batch: Batch | None, config: Config) -> RunError:
    """The failure of a run whose memory was exhausted, to be raised instead of `error`.

    phase: the timer that ran; batch: this worker's share of the global batch if a step was at work on one.
    """
    asked = _ASKED.search(str(error))
    what = f"out of memory in the phase '{phase}'" + (f" ({asked[1]} asked for)" if asked else "")
    if batch is None:
        return RunError(f"{what}: {_elsewhere(phase)}")
    objects = [len(target.labels) for target in batch.targets]
    named = [f"{printable(image)} ({count})" for image, count in zip(batch.image_ids, objects)][:_MOST_IMAGES]
    more = f" and {len(batch) - len(named)} more" if len(batch) > len(named) else ""
    return RunError(
        f"{what}: {len(batch)} images with {sum(objects)} objects: {', '.join(named)}{more}; "
        f"what helps: {_remedies(batch, config)}"
    )


def _remedies(batch: Batch, config: Config) -> str:
    """The settings that take less memory, that which costs least first."""
    images = min(config.train.micro_batch or len(batch), len(batch))
    height, width = batch.images.shape[-2:]
    remedies = []
    if images > 1:
        remedies.append(f"train.micro_batch={images // 2} (now {images}; the same training)")
    if not config.train.activation_checkpointing:
        remedies.append("train.activation_checkpointing=true (the same training, slower)")
    remedies.append(f"smaller crops by data.augment (now {height}x{width}; another training)")
    return ", ".join(remedies)


def _elsewhere(phase: str) -> str:
    if phase == "evaluate":
        return "smaller images by data.test_resize help (other figures), or a card with more memory"
    if phase == "data_wait":
        return "fewer images for each worker help: more cluster.workers, or smaller crops by data.augment"
    return "the model itself does not fit: a smaller one, or a machine with more memory, helps"
