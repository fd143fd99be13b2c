"""The report of `mpformer doctor`: what is installed, what this machine has, and what will run on it."""

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
from mpformer.cores import usable_cores
from mpformer.home import home_folder
from mpformer.tracking.commit import git_commit
from mpformer.tracking.mlflow_store import first_line

# distribution, module to import, what it is used for
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
SHARED_MEMORY = Path("/dev/shm")


def lines() -> Iterator[str]:
    """The report, line by line; the last one lists the problems."""
    problems: list[str] = []
    yield f"mpformer {__version__}, commit {git_commit() or 'unknown (no checkout)'}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield ""
    for distribution, module, purpose in _PARTS:
        version, problem = _installed(distribution, module)
        yield f"{distribution:24} {version:16} {problem or purpose}"
        if problem:
            problems.append(f"{distribution}: {problem}")
    yield ""
    if not any(problem.startswith("torch:") for problem in problems):
        yield from _devices()
        yield from _deformable_attention(problems)
    yield from _machine(problems)
    yield ""
    yield "no problems found" if not problems else "problems: " + "; ".join(problems)


def _installed(distribution: str, module: str) -> tuple[str, str]:
    """(version, problem in words or '')."""
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


def _deformable_attention(problems: list[str]) -> Iterator[str]:
    from mpformer.ops.status import kernel_status

    for status in kernel_status():
        yield f"deformable attention on {status.device}: {status.kernel} ({status.reason})"
        if status.advice:
            problems.append(f"deformable attention on {status.device} is not compiled: {status.advice}")


def _machine(problems: list[str]) -> Iterator[str]:
    memory = psutil.virtual_memory()
    yield f"CPU: {usable_cores()} of {os.cpu_count()} cores usable"
    yield f"memory: {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if SHARED_MEMORY.is_dir():  # Linux
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free >= SCARCE_SHM:
            yield f"shared memory: {free / 2**30:.1f} GiB free, for Ray's object store"
        else:
            yield f"shared memory: {free / 2**20:.0f} MiB free, so Ray's object store goes to /tmp"
            problems.append(
                f"{SHARED_MEMORY} is small, so samples pass through files in /tmp, slower on a disk: "
                "docker run --shm-size=8g"
            )
    free = shutil.disk_usage(".").free
    yield f"disk: {free / 2**30:.1f} GiB free in this folder"
    if free < SCARCE_DISK:
        problems.append("the disk is nearly full")
    home = home_folder()
    if home is None or not os.access(home, os.W_OK):
        what = "there is no home folder" if home is None else f"{home} is not writable"
        problems.append(f"{what}, Ray keeps a token there: set HOME or RAY_AUTH_MODE")
    yield f"cluster: {os.environ.get('RAY_ADDRESS', 'this machine (RAY_ADDRESS is not set)')}"
