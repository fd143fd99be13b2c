"""Which code runs the operators on which device: chosen once per process, with a warning if it is slow."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpformer.ops import build
from mpformer.ops.cpu import Library, OtherSourcesError
from mpformer.ops.cuda import CudaKernel, find_cuda_kernel
from mpformer.ops.mask_pairs import PointKernel
from mpformer.ops.reference import Shapes

SETTING = "MPFORMER_DEFORM_ATTN"


class Kernel(Protocol):
    """A compiled form of the operator; arguments as in mpformer/ops/deform_attn.py, never empty."""

    name: str  # instruction set or architecture

    def forward(
        self, value: Tensor, shapes: Shapes, reference: Tensor | None, points: Tensor, weights: Tensor
    ) -> Tensor: ...

    def backward(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor | None,
        points: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def kernel_for(value: Tensor) -> Kernel | None:
    """The compiled kernel for this tensor, None where the reference is to run."""
    if value.dtype == torch.float64:
        return None  # the reference is the float64 form
    return _chosen(value.device.type, value.device.index or 0)


def cpu_library(values: Tensor) -> Library | None:
    """The compiled library if it can work on this tensor's device and type, else None."""
    if values.device.type != "cpu" or values.dtype == torch.float64:
        return None
    kernel = _chosen("cpu", 0)
    return kernel if isinstance(kernel, Library) else None


def point_kernel(values: Tensor) -> PointKernel | None:
    """The compiled mask losses and random numbers for this tensor's device and type, None where the plain
    path is to run."""
    if values.device.type == "cuda" and values.dtype != torch.float64:
        kernel = _chosen("cuda", values.device.index or 0)
        return kernel.points if isinstance(kernel, CudaKernel) else None
    library = cpu_library(values)
    return None if library is None else library.points


@lru_cache
def _chosen(device: str, index: int) -> Kernel | None:
    kernel, reason = find_kernel(device, index)
    if kernel is None and not reference_wanted():
        slower = "20 times slower or more" if device == "cpu" else "much slower"  # benchmarks/results
        warnings.warn(
            f"ms_deform_attn on {device} runs in plain PyTorch, {slower} than the compiled kernel, and so "
            f"do mask losses and random numbers, because {reason}. `mpformer doctor` says how to get the "
            f"compiled one.",
            RuntimeWarning,
            stacklevel=2,
        )
    return kernel


def reference_wanted() -> bool:
    """Whether the environment variable MPFORMER_DEFORM_ATTN selects the reference."""
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", "reference"):
        raise ValueError(f"{SETTING} must be auto or reference, not {setting!r}")
    return setting == "reference"


def find_kernel(device: str, index: int = 0) -> tuple[Kernel | None, str]:
    """The kernel for a device, and in words where it comes from or why there is none."""
    if reference_wanted():
        return None, f"{SETTING}=reference selects it"
    if device == "cpu":
        return _cpu_kernel()
    if device == "cuda":
        return find_cuda_kernel(index)
    return None, f"there is no compiled kernel for devices of type {device!r}"


@lru_cache
def _cpu_kernel() -> tuple[Library | None, str]:
    """The library built at installation if it is of these sources, else the one in the user's cache."""
    reasons = []
    for path in sorted(Path(__file__).parent.glob("_deform_attn_cpu*.so")):
        try:
            return Library(str(path), build.source_hash()), f"built at installation: {path}"
        except OSError as error:
            reasons.append(f"the installed library does not load ({error})")
        except OtherSourcesError:
            reasons.append("the installed library was built from other sources")
    try:
        path = build.cached_library()
        return Library(str(path), build.source_hash()), f"built on first use: {path}"
    except build.BuildError as error:
        reasons.append(str(error))
    except OSError as error:
        reasons.append(f"the library does not load ({error})")
    return None, "; ".join(reasons)
