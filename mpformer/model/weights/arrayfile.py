"""Pickles of NumPy arrays, read by a reader that knows what such an array consists of and nothing else.

Nothing that a pickle names is looked up or called, NumPy's own functions included: they trust a pickle, and
some bytes make them alter the data types of the whole process. What a pickle names becomes a stand-in that
notes its arguments; arrays are made of these notes once they are checked.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

_CORES = [f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "numeric")]
_NUMBERS = re.compile(r"([<>=|]?)([fiu][1248]|b1)")
"""Data types of plain numbers as NumPy writes them, with their byte order."""


class StoredArray:
    """What a pickle says of an array: nothing of it has been checked."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_order, data = state
        self._parts = (data, dtype, shape, "F" if column_order else "C")

    def array(self) -> np.ndarray | None:
        """The array, in its own memory and the machine's byte order; None where it is not one of numbers.

        Raises `ValueError` or `TypeError` where what the pickle says contradicts itself.
        """
        data, dtype, shape, order = self._parts
        found = _NUMBERS.fullmatch(dtype.spec) if isinstance(dtype, _StoredType) else None
        if found is None:
            return None
        kind = np.dtype(f"{found[1] or dtype.order}{found[2]}")
        content = data.encode("latin1") if isinstance(data, str) else bytes(data)  # Python 2 had no bytes
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an array of shape {shape!r:.50}")
        if math.prod(shape) * kind.itemsize != len(content):
            raise ValueError(f"an array of shape {shape!r:.50} and {len(content)} bytes")
        flat = np.frombuffer(content, kind).astype(kind.newbyteorder("="))
        return flat.reshape(shape, order="F" if order == "F" else "C")


class _StoredType:
    """What a pickle says of a data type."""

    def __init__(self, spec: str, *_: Any) -> None:
        self.spec, self.order = str(spec), "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class _Named:
    """The stand-in of what a pickle names: it can be called, and neither altered nor looked into."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state for {self._name}")

    def __call__(self, *arguments: Any) -> Any:
        if self._name == "OrderedDict":
            return dict(*arguments)
        if self._name == "encode":  # how protocol 2 writes bytes
            text, codec = arguments
            if codec != "latin1":
                raise pickle.UnpicklingError(f"text in {codec!r:.50}")
            return text.encode("latin1")
        if self._name == "dtype":
            return _StoredType(*arguments)
        if self._name == "scalar":
            return None  # a number, not an array
        return StoredArray(*arguments)


_KNOWN = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((core, name) for core in _CORES for name in ("_reconstruct", "scalar", "_frombuffer")),
}
"""What a pickle may name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is neither array nor plain container")
        return _Named(name)


class _Stream:
    """A file that is read by copying: where a pickle ends early, nothing is left of half-filled buffers."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.read, self.readline = stream.read, stream.readline


def read_arrays(file: Path) -> Any:
    """The content of a pickle of plain containers, with a `StoredArray` in the place of each array.

    Raises `pickle.UnpicklingError` for one that names anything else, and any exception for a damaged one.
    """
    with file.open("rb") as stream:
        return _Unpickler(_Stream(stream), encoding="latin1").load()
