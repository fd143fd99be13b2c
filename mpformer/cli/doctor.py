"""What `mpformer doctor` says: what is installed, what this machine has, and what will run on it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from mpformer import __version__
from mpformer.tracking.commit import git_commit
from mpformer.tracking.mlflow_store import first_line

# distribution, module to import, what it does here
_PARTS = (
    ("torch", "torch", "tensors"),
    ("torchvision", "mpformer.model.backbone", "needed by timm"),
    ("timm", "mpformer.model.backbone", "backbones"),
    ("ray", "ray", "data, training and studies on a cluster"),
    ("mlflow", "mlflow", "comparison of runs"),
    ("pycocotools", "pycocotools.mask", "AP and run-length masks"),
    ("scipy", "scipy.optimize", "matching, statistics"),
    ("opencv-python-headless", "cv2", "images"),
    ("numpy", "numpy", "arrays"),
    ("pyarrow", "pyarrow", "samples between processes"),
    ("pydantic", "pydantic", "settings"),
    ("safetensors", "safetensors", "checkpoints"),
    ("matplotlib", "matplotlib", "curves"),
)
SCARCE_DISK = 5 * 2**30
SCARCE_SHM = 2 * 2**30


def lines() -> Iterator[str]:
    """The report, line by line; the last one sums it up."""
    troubles: list[str] = []
    yield f"mpformer {__version__}, commit {git_commit() or 'unknown (not a git tree)'}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield ""
    for distribution, module, purpose in _PARTS:
        version, trouble = _installed(distribution, module)
        yield f"{distribution:24} {version:16} {trouble or purpose}"
        if trouble:
            troubles.append(f"{distribution}: {trouble}")
    yield ""
    if not any(trouble.startswith("torch:") for trouble in troubles):
        yield from _devices()
        yield from _deformable_attention(troubles)
    yield from _machine(troubles)
    yield ""
    yield "all is well" if not troubles else "to be seen to: " + "; ".join(troubles)


def _installed(distribution: str, module: str) -> tuple[str, str]:
    """(version, trouble in words or '')."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "-", f"not installed: pip install {distribution}"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what broken installs raise
        return version, f"cannot be imported: {first_line(error)}"
    return version, ""


def _devices() -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        yield f"GPU: none that torch ({built}) can use; training runs on the CPU"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        yield f"GPU {i}: {found.name}, {found.total_memory / 2**30:.0f} GiB, trains in {precision}"


def _deformable_attention(troubles: list[str]) -> Iterator[str]:
    from mpformer.ops.status import kernel_status

    for status in kernel_status():
        yield f"deformable attention on {status.device}: {status.kernel} ({status.reason})"
        if status.advice:
            troubles.append(f"deformable attention on {status.device} is the slow one: {status.advice}")


def _machine(troubles: list[str]) -> Iterator[str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield f"CPU: {usable} of {os.cpu_count()} cores usable"
    yield f"memory: {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield f"shared memory: {free / 2**30:.1f} GiB free, for Ray's object store"
        if free < SCARCE_SHM:
            troubles.append("shared memory is scarce, so Ray will go to the disk: docker run --shm-size=8g")
    free = shutil.disk_usage(".").free
    yield f"disk: {free / 2**30:.1f} GiB free in this folder"
    if free < SCARCE_DISK:
        troubles.append("the disk is nearly full")
    if not os.access(Path.home(), os.W_OK):
        troubles.append(
            f"{Path.home()} cannot be written, where Ray keeps its token: set HOME or RAY_AUTH_MODE"
        )
    yield f"cluster: {os.environ.get('RAY_ADDRESS', 'this machine (RAY_ADDRESS is not set)')}"
