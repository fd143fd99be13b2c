"""Random numbers of a training step: one stream per image, keyed by seed, purpose and position in the run.

Sampled points and pilot noise of an image are therefore the same whatever worker, micro-batch or restart
it meets, so a run does not depend on how its global batch is dealt out. Pilots have streams of their own:
switching them on or off, or their noise, leaves the matching part's points as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class SampleRandom:
    """The random streams of the images of one micro-batch, for one purpose ('matching', 'pilots').

    On a CPU the numbers are numpy's SFC64, which takes a third of the time of torch's generator; on other
    devices they are made there. So a stream depends on the kind of device, too.
    """

    def __init__(self, seed: int, purpose: str, positions: Sequence[int], device: torch.device) -> None:
        self.device = device
        keys = [_key(seed, purpose, p) for p in positions]
        self._on_cpu = device.type == "cpu"
        self._streams = [
            np.random.Generator(np.random.SFC64(key))
            if self._on_cpu
            else torch.Generator(device).manual_seed(key)
            for key in keys
        ]

    def uniform(self, image: int, *shape: int) -> Tensor:
        """float32 in [0, 1) from the stream of the image-th image."""
        stream = self._streams[image]
        if self._on_cpu:
            return torch.from_numpy(stream.random(shape, dtype=np.float32))
        return torch.rand(shape, generator=stream, device=self.device)

    def points(self, image: int, masks: int, count: int) -> Tensor:
        """Random points of the image-th image, packed (see `mpformer.model.points.unpack`): [masks,count]
        int32."""
        stream = self._streams[image]
        if self._on_cpu:
            total = masks * count
            bits = stream.integers(2**64 - 1, size=(total + 1) // 2, dtype=np.uint64, endpoint=True)
            return torch.from_numpy(bits.view(np.int32)[:total].reshape(masks, count))
        shape, ends = (masks, count), (-(2**31), 2**31)
        return torch.randint(*ends, shape, generator=stream, device=self.device, dtype=torch.int32)

    def permutation(self, image: int, count: int) -> Tensor:
        """A random order of 0..count-1, int64 [count]."""
        stream = self._streams[image]
        if self._on_cpu:
            return torch.from_numpy(stream.permutation(count))
        return torch.randperm(count, generator=stream, device=self.device)


def _key(seed: int, purpose: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number
