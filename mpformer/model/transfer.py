"""Numbers on their way between the host and its device: only for `to_host` does the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(values: Tensor) -> Tensor:
    """The values on the CPU. The host waits for all that its GPU was given to do before.

    Of a training step these are the only waits: torch's sync debug mode forbids all others and lets this one
    pass, since it waits for an event.
    """
    if values.device.type != "cuda":
        return values.cpu()
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))
    arrived.synchronize()
    return copy


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device; the host does not wait."""
    if device.type == "cuda":
        values = values.pin_memory()  # from other memory the driver would copy while the host waits
    return values.to(device, non_blocking=True)
