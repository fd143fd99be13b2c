"""Tensors that follow from sizes alone, such as positions: computed once per size and device, then kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from torch import Tensor

_Make = TypeVar("_Make", bound=Callable[..., Tensor])
_KEPT = 64
"""Tables of one function that are kept at the same time."""


def kept_table(make: _Make) -> _Make:
    """A function of positional, hashable arguments whose tensors are kept, in training and inference alike.

    In a part that `train.compile` compiles, the graph computes the table: torch's compiler traces through a
    cache of Python as if it were not there, and warns of it.
    """

    @functools.lru_cache(maxsize=_KEPT)
    def kept(*args: Hashable) -> Tensor:
        with torch.inference_mode(False):  # a table made during inference is used in training, too
            return make(*args)

    @functools.wraps(make)
    def table(*args: Hashable) -> Tensor:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return cast(_Make, table)
