"""An exponential moving average of the weights (`train.ema`), evaluated and stored beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mpformer.model.architecture import Architecture


class WeightAverage:
    """The average of a model's parameters over training steps; statistics of norms are the model's own.

    Begins as the parameters of the model are. Each worker has one, all the same. After step t the decay is
    the smaller of `decay` and (1 + t) / (10 + t), so that the first weights are soon forgotten.
    """

    def __init__(self, model: Architecture, decay: float) -> None:
        self._model, self._decay = model, decay
        self._averages = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after so many steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights: list[Tensor] = list(self._model.parameters())
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The state dict of the model with the averaged weights."""
        return {**self._model.state_dict(), **self._averages}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of before."""
        for name, average in self._averages.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While the body runs, the model has the averaged weights; then its own again, bit for bit."""
        own = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._fill(list(self._averages.values()))
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._model.parameters(), values):
            parameter.copy_(value)
