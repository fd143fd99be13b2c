"""Random numbers of a training step: a function of seed, purpose, position, head or layer, and row.

Sampled points and pilot noise of an image are therefore the same on any device and worker, in any micro-batch
and after any restart, so a run does not depend on how its global batch is divided. Each purpose has numbers
of its own: switching pilots or their noise on or off leaves the points of the matching part as they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpformer.model.points import unpack
from mpformer.model.transfer import to_device
from mpformer.ops.random_bits import random_bits

Purpose = Literal[
    "matching", "losses", "consistency",
    "pilot objects", "pilot labels", "pilot noise", "pilot matching", "pilot losses",
]  # fmt: skip


class Draws:
    """Random numbers for n rows of something, such as pilots: each call gives new ones.

    A row's numbers depend on nothing but what the row is for, never on the rows beside it.
    """

    def __init__(self, streams: Tensor) -> None:
        """streams: [n,4] int32, see `mpformer.ops.random_bits`."""
        self.streams = streams
        self._calls = 0

    def __len__(self) -> int:
        return len(self.streams)

    def some(self, rows: Tensor | slice) -> Draws:
        """The numbers of some of the rows, from the first call on."""
        return Draws(self.streams[rows])

    def uniform(self, *shape: int) -> Tensor:
        """[n,*shape] float32 in [0, 1), on the device of the rows."""
        # a float32 holds 24 bits of a number in 0..1
        upper = self._bits(math.prod(shape)).bitwise_right_shift_(8)
        return upper.float().mul_(2.0**-24).add_(0.5).view(-1, *shape)

    def points(self, count: int) -> Tensor:
        """[n,count,2] float32, (x, y) in 0..1."""
        return unpack(self._bits(count))

    def _bits(self, count: int) -> Tensor:
        bits = random_bits(self.streams, self._calls, count)
        self._calls += 1
        return bits


class SampleRandom:
    """The random numbers of the images of one micro-batch."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device) -> None:
        """positions: of the images in the run's sample stream."""
        self.device = device
        self._seed, self._positions = seed, tuple(positions)

    def rows(
        self, purpose: Purpose, images: np.ndarray, rows: np.ndarray | int, places: np.ndarray | int
    ) -> Draws:
        """Numbers for n rows, on the device.

        images [n]: of the micro-batch, which each row belongs to; rows [n]: a row's number within its image,
        such as that of an object; places [n]: of the head or layer.
        """
        keys = np.array([_key(self._seed, purpose, position) for position in self._positions], np.uint64)
        streams = np.empty((len(images), 4), np.int32)
        streams[:, :2] = keys.view(np.int32).reshape(-1, 2)[images]
        streams[:, 2], streams[:, 3] = rows, places
        return Draws(to_device(torch.from_numpy(streams), self.device))

    def on_host(self) -> SampleRandom:
        """The same numbers on the CPU."""
        return SampleRandom(self._seed, self._positions, torch.device("cpu"))


def _key(seed: int, purpose: Purpose, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
