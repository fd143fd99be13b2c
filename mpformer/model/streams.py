"""Random numbers of a training step: one stream per image, keyed by seed and position in the run.

Sampled points and pilot noise of an image are therefore the same whatever worker, micro-batch or restart
it meets, so a run does not depend on how its global batch is dealt out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleRandom:
    """The random streams of the images of one micro-batch."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._streams = [torch.Generator(device).manual_seed(_key(seed, p)) for p in positions]

    def uniform(self, image: int, *shape: int) -> Tensor:
        """float32 in [0, 1) from the stream of the image-th image."""
        return torch.rand(shape, generator=self._streams[image], device=self._device)

    def permutation(self, image: int, count: int) -> Tensor:
        """A random order of 0..count-1, int64 [count]."""
        return torch.randperm(count, generator=self._streams[image], device=self._device)


def _key(seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number
