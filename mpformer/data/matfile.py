"""COCO-Stuff-10K keeps its label maps in MATLAB files: the one reader of these."""

from __future__ import annotations

import io
import warnings
import zlib
from typing import Literal

import numpy as np
from scipy.io.matlab import loadmat

from mpformer import filekind
from mpformer.data.images import read_bytes
from mpformer.types import InputError

# what scipy warns of in a damaged file is of no use without the file's name
warnings.filterwarnings("ignore", module=r"scipy\.io\.matlab")


_HEADER = 128
"""Bytes before the first element of a MATLAB 5 file; the last two tell the byte order."""
_COMPRESSED = 15
"""The type of a compressed element."""
_MOST = 1 << 30
"""Bytes of an element that are inflated at most."""


def load_stuff_map(path: str) -> np.ndarray:
    """The label map `S` of a COCO-Stuff-10K file, [h,w] int32: 0 unlabelled, 1..91 things, 92..182 stuff.

    Raises `InputError` for a file that holds no such map, and for one that is not compressed, as MATLAB's
    are since version 7: only the compression's checksums tell a damaged file, on some of which scipy's parser
    ends the process.
    """
    data = read_bytes(path)
    try:
        _check_whole(data)
        content = loadmat(io.BytesIO(data), variable_names=["S"])
    except Exception as error:  # scipy's parser raises whatever its steps do
        reason = str(error) or type(error).__name__
        kind = filekind.described(data)
        raise InputError(f"{path}: not a MATLAB file that can be read ({kind}): {reason}") from error
    labels = content.get("S")
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or not labels.size:
        raise InputError(f"{path}: no label map 'S' in it: COCO-Stuff-10K's form is expected")
    if labels.dtype.kind not in "iuf" or not np.isin(labels, np.arange(65536)).all():
        raise InputError(
            f"{path}: the label map 'S' is {labels.dtype}; whole numbers in 0..65535 are expected"
        )
    return labels.astype(np.int32)


def _check_whole(data: bytes) -> None:
    """Raise `ValueError` or `zlib.error` unless a MATLAB 5 file is all of compressed elements, and intact."""
    order: dict[bytes, Literal["little", "big"]] = {b"IM": "little", b"MI": "big"}
    if len(data) <= _HEADER or data[126:128] not in order:
        raise ValueError("a file of MATLAB 5 or newer is expected")
    position = _HEADER
    while position < len(data):
        kind, length = (
            int.from_bytes(data[at : at + 4], order[data[126:128]]) for at in (position, position + 4)
        )
        body = data[position + 8 : position + 8 + length]
        if kind != _COMPRESSED or len(body) != length:
            raise ValueError("it is not compressed, or cut short: save it compressed (-v7)")
        inflater = zlib.decompressobj()
        inflater.decompress(body, _MOST)
        if not inflater.eof:
            raise ValueError("an element is cut short, or larger than 1 GiB")
        position += 8 + length
