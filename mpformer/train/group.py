"""The workers of a run as one of them sees them: its rank and device, and what they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Group:
    """One worker among all of a run. Every worker must call each method, in the same order."""

    rank: int
    world: int
    """Number of workers."""
    device: torch.device

    def gather(self, items: list[_T]) -> list[_T]:
        """All workers' items in rank order on rank 0; an empty list on the others."""
        if self.world == 1:
            return items
        gathered: list[list[_T]] | None = [[] for _ in range(self.world)] if self.rank == 0 else None
        dist.gather_object(items, gathered)
        return [item for of_one in gathered or [] for item in of_one]

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name, each summed over all workers in float64. The names are the same on all workers."""
        summed = torch.stack([value.double() for value in values.values()])
        if self.world > 1:
            dist.all_reduce(summed)
        return dict(zip(values, summed.unbind()))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker: the same on all of them."""
        flags = torch.tensor(float(flag), device=self.device)
        if self.world > 1:
            dist.all_reduce(flags)
        return bool(flags > 0)

    def in_turn(self, act: Callable[[], None]) -> None:
        """Run `act` on one worker after the other: those of one machine share its folders."""
        for rank in range(self.world):
            if rank == self.rank:
                act()
            if self.world > 1:
                dist.barrier()
