"""Which deformable-attention kernel runs here and why, as data for `mpformer doctor`."""

from dataclasses import dataclass

import torch

from mpformer.ops.kernels import SETTING, find_kernel, reference_wanted


@dataclass(frozen=True)
class KernelStatus:
    """What `ms_deform_attn` runs on tensors of one device type."""

    device: str  # cpu or cuda
    kernel: (
        str  # an instruction set ("avx2"), an architecture ("sm_90"), "reference", or "none" without a device
    )
    compiled: bool
    reason: str  # where the kernel comes from, or why there is no better one
    advice: str | None  # how to get the better one


def kernel_status() -> tuple[KernelStatus, ...]:
    """The kernels for the CPU and for CUDA; builds or compiles them if that has not happened yet."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = [_status(device) for device in devices]
    if "cuda" not in devices:
        found.append(KernelStatus("cuda", "none", False, "torch sees no CUDA device", None))
    return tuple(found)


def _status(device: str) -> KernelStatus:
    kernel, reason = find_kernel(device)
    if kernel is not None:
        return KernelStatus(device, kernel.name, True, reason, None)
    if reference_wanted():
        advice = f"unset {SETTING}"
    elif device == "cpu":
        advice = (
            "install a C++ compiler (Debian: apt install g++; conda: conda install gxx) and run this again"
        )
    else:
        advice = (
            f"pip install nvidia-cuda-nvrtc for CUDA {torch.version.cuda} (torch from PyPI brings it along)"
        )
    return KernelStatus(device, "reference", False, reason, advice)
