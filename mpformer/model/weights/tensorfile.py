"""Files of named tensors, read without executing anything that they contain."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpformer.types import InputError

_WRAPPERS = ("model", "state_dict", "model_state", "module")
"""Keys under which training programs store the weights beside optimiser and counters."""

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}
"""What a pickle may name: NumPy arrays and plain containers."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors, .pkl (NumPy) or torch file, on the CPU, as they are stored.

    A torch file is read with `weights_only`, a pickle by an unpickler that admits NumPy arrays and plain
    containers only. Wrapping as in {"model": ..., "optimizer": ...} is undone. Raises `InputError` where the
    file is unreadable, would need code, or holds no tensors.
    """
    try:
        content = _read(file)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{file}: no file of tensors alone: {_reason(error)}") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, struct.error) as error:
        raise InputError(f"{file}: cannot be read: {_reason(error)}") from None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: named tensors are expected, not a {type(content).__name__}")
    tensors = {str(k): torch.as_tensor(v) for k, v in content.items() if isinstance(v, Tensor | np.ndarray)}
    if not tensors:
        raise InputError(f"{file}: holds no tensors")
    return tensors


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".pkl":
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream, encoding="latin1").load()
    return torch.load(file, map_location="cpu", weights_only=True)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a plain container")
        return super().find_class(module, name)


def _reason(error: Exception) -> str:
    text = str(error)
    # torch's advice on how to load the file all the same is none to pass on
    _, _, named = text.partition("WeightsUnpickler error: ")
    lines = (named or text).strip().splitlines()
    return lines[0].split(". Please use")[0] if lines else type(error).__name__
