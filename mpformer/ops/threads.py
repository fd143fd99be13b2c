"""The threads of the compiled CPU kernels: those that torch runs on."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache
def torch_threads() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch runs on, None where it is not found.

    All three runtimes that torch is built with (GNU, LLVM, Intel) offer this entry point. Where the process
    has loaded several, the one that lies in torch's own folders is torch's.
    """
    maps = Path("/proc/self/maps")  # Linux only
    if not maps.exists():
        return None
    loaded = set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp)[^/\s]*\.so\S*)$", maps.read_text(), re.MULTILINE))
    site_packages = str(Path(torch.__file__).parents[1])
    own = {
        path
        for path in loaded
        if path.startswith((f"{site_packages}/torch/", f"{site_packages}/torch.libs/"))
    }
    if len(own or loaded) != 1:
        return None
    runtime = ctypes.CDLL(next(iter(own or loaded)))
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
