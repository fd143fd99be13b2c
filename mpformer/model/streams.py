"""Random numbers of a training step: one stream per image, keyed by seed, purpose and position in the run.

Sampled points and pilot noise of an image are therefore the same on any worker, in any micro-batch and after
any restart, so a run does not depend on how its global batch is divided. Pilots have streams of their own:
switching them or their noise on or off leaves the points of the matching part as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class _Stream(Protocol):
    """The random numbers of one image; the methods are those of `SampleRandom`, without the image."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor: ...
    def points(self, masks: int, count: int) -> Tensor: ...
    def permutation(self, count: int) -> Tensor: ...


class _HostStream:
    """numpy's SFC64, which takes a third of the time of torch's generator on a CPU."""

    def __init__(self, key: int) -> None:
        self._random = np.random.Generator(np.random.SFC64(key))

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._random.random(shape, dtype=np.float32))

    def points(self, masks: int, count: int) -> Tensor:
        total = masks * count
        bits = self._random.integers(2**64 - 1, size=(total + 1) // 2, dtype=np.uint64, endpoint=True)
        return torch.from_numpy(bits.view(np.int32)[:total].reshape(masks, count))

    def permutation(self, count: int) -> Tensor:
        return torch.from_numpy(self._random.permutation(count))


class _DeviceStream:
    """torch's generator of a device."""

    def __init__(self, key: int, device: torch.device) -> None:
        self._device = device
        self._random = torch.Generator(device).manual_seed(key)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self._random, device=self._device)

    def points(self, masks: int, count: int) -> Tensor:
        shape, bounds = (masks, count), (-(2**31), 2**31)
        return torch.randint(*bounds, shape, generator=self._random, device=self._device, dtype=torch.int32)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._random, device=self._device)


class SampleRandom:
    """The random streams of the images of one micro-batch, for one purpose ('matching', 'pilots').

    The numbers are made on the device, so a stream also depends on the kind of device.
    """

    def __init__(self, seed: int, purpose: str, positions: Sequence[int], device: torch.device) -> None:
        self.device = device
        keys = [_key(seed, purpose, position) for position in positions]
        self._streams: list[_Stream] = [
            _HostStream(key) if device.type == "cpu" else _DeviceStream(key, device) for key in keys
        ]

    def uniform(self, image: int, *shape: int) -> Tensor:
        """float32 in [0, 1) from the stream of the image-th image."""
        return self._streams[image].uniform(shape)

    def points(self, image: int, masks: int, count: int) -> Tensor:
        """Random points of the image-th image, packed (see `mpformer.model.points.unpack`): [masks,count]
        int32."""
        return self._streams[image].points(masks, count)

    def permutation(self, image: int, count: int) -> Tensor:
        """A random order of 0..count-1, int64 [count]."""
        return self._streams[image].permutation(count)


def _key(seed: int, purpose: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number
