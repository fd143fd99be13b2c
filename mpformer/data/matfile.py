"""COCO-Stuff-10K keeps its label maps in MATLAB files: the one reader of these."""

from __future__ import annotations

import io
import zlib

import numpy as np
from scipy.io.matlab import MatReadError, loadmat

from mpformer.data.images import read_bytes
from mpformer.types import InputError


def load_stuff_map(path: str) -> np.ndarray:
    """The label map `S` of a COCO-Stuff-10K file, [h,w] int32: 0 unlabelled, 1..91 things, 92..182 stuff.

    Raises `InputError` for a file that holds no such map.
    """
    try:
        content = loadmat(io.BytesIO(read_bytes(path)), variable_names=["S"])
    except (MatReadError, ValueError, TypeError, NotImplementedError, OSError, zlib.error) as error:
        raise InputError(f"{path}: not a MATLAB file that can be read: {error}") from None
    if "S" not in content or content["S"].ndim != 2:
        raise InputError(f"{path}: no label map 'S' in it: COCO-Stuff-10K's form is expected")
    return content["S"].astype(np.int32)
