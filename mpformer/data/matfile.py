"""COCO-Stuff-10K keeps its label maps in MATLAB files: the one reader of these."""

from __future__ import annotations

import io
import warnings

import numpy as np
from scipy.io.matlab import loadmat

from mpformer import filekind
from mpformer.data.images import read_bytes
from mpformer.types import InputError

# what scipy warns of in a damaged file is of no use without the file's name
warnings.filterwarnings("ignore", module=r"scipy\.io\.matlab")


def load_stuff_map(path: str) -> np.ndarray:
    """The label map `S` of a COCO-Stuff-10K file, [h,w] int32: 0 unlabelled, 1..91 things, 92..182 stuff.

    Raises `InputError` for a file that holds no such map.
    """
    data = read_bytes(path)
    try:
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
