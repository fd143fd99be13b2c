"""Tensors that follow from sizes alone, such as positions: computed once per size and device, then kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

_P = ParamSpec("_P")
_KEPT = 64
"""Tables of one function that are kept at the same time."""


def kept_table(make: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """A function of hashable arguments whose tensors are kept, in training and inference alike.

    In a part that `train.compile` compiles, the graph computes the table: torch's compiler traces through a
    cache of Python as if it were not there, and warns of it.
    """

    @functools.lru_cache(maxsize=_KEPT)
    def kept(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        with torch.inference_mode(False):  # a table made during inference is used in training, too
            return make(*args, **kwargs)

    @functools.wraps(make)
    def table(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        return make(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return table
