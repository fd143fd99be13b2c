"""Files of named tensors, read without executing anything that they contain."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mpformer.model.weights.arrayfile import StoredArray, read_arrays
from mpformer.model.weights.filekind import Container, container_of
from mpformer.types import InputError

_DEPTH = 8
"""Levels of nested dictionaries that are looked into."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors, pickle (NumPy) or torch file, on the CPU, as they are stored.

    The format is told from the content, not from the name. A torch file is read with `weights_only`, a pickle
    by a reader that knows NumPy arrays and plain containers only. Nested dictionaries become dotted
    names: {"model": {"w": ...}} gives "model.w"; `mpformer.model.weights.prefixes` takes such wrapping off.
    Raises `InputError`, naming the file, where it is something else, damaged, would need code, or holds no
    tensors.
    """
    container = container_of(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on old formats; what matters is an error below
            content = _READERS[container](file)
            tensors = dict(_named_tensors(content, file))
    except InputError:
        raise
    # a damaged pickle makes the unpickler do anything, and the readers name no class for what then fails
    except Exception as error:  # noqa: BLE001
        raise InputError(f"{file}: {_reason(error)}") from None
    if not tensors:
        what = "" if isinstance(content, Mapping) else f" but a {type(content).__name__}"
        raise InputError(f"{file}: holds no named tensors{what}")
    return tensors


def _read_torch(file: Path) -> Any:
    # given a name, torch takes the format from its end
    with file.open("rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


_READERS: dict[Container, Callable[[Path], Any]] = {
    "safetensors": load_file,
    "torch": _read_torch,
    "pickle": read_arrays,
}


def _named_tensors(content: Any, file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors and arrays of nested dictionaries with their dotted names, each name once."""
    seen: set[str] = set()
    opened: set[int] = set()  # a dictionary may hold itself
    pending = [("", content, 0)]
    while pending:
        prefix, value, depth = pending.pop()
        if isinstance(value, Mapping):
            if depth < _DEPTH and id(value) not in opened:
                opened.add(id(value))
                # names alone: numbers are the keys of an optimiser's state
                inner = [
                    (f"{prefix}.{k}" if prefix else k, v) for k, v in value.items() if isinstance(k, str)
                ]
                pending.extend((name, v, depth + 1) for name, v in reversed(inner))
            continue
        tensor = _as_tensor(value, prefix, file)
        if tensor is None or not prefix:
            continue
        if prefix in seen:
            raise InputError(f"{file}: holds the tensor {shown(prefix)} twice")
        seen.add(prefix)
        yield prefix, tensor


def _as_tensor(value: Any, name: str, file: Path) -> Tensor | None:
    """A plain CPU tensor; None for what is neither tensor nor array of numbers."""
    if isinstance(value, StoredArray):
        array = value.array()
        return None if array is None else torch.from_numpy(array)
    if not isinstance(value, Tensor):
        return None
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
        raise InputError(f"{file}: the tensor {shown(name)} is {kind}: a plain one is expected")
    return value.detach()


def shown(name: str) -> str:
    """A tensor's name in quotes, cut to a length that a message bears."""
    return repr(name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}")


def _reason(error: Exception) -> str:
    """Why a file was not read, in one line, without torch's advice on how to run its code all the same."""
    text = str(error)
    if code := re.search(r"\bGLOBAL (\S+)", text):
        return (
            f"no file of tensors alone: it needs code to be read ({code[1][:100]}), which is never run; "
            "store the tensors alone: torch.save(model.state_dict(), FILE)"
        )
    if "Unsupported operand" in text:
        return (
            "is damaged, or was saved with a pickle protocol that torch reads with code alone: save it with "
            "torch's default protocol"
        )
    _, _, named = text.partition("WeightsUnpickler error: ")
    lines = (named or text).strip().splitlines()
    return f"is cut short or damaged: {lines[0][:300] if lines else type(error).__name__}"
