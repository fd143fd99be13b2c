"""Copies between host and device; only `to_host` makes the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(values: Tensor) -> Tensor:
    """The values on the CPU. The host waits until queued GPU work finishes.

    These are the only waits of a training step: a test forbids all others with torch's sync debug mode, which
    permits waiting for an event.
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
    """Values of the CPU copied to a device; the host does not wait."""
    if device.type == "cuda":
        values = values.pin_memory()  # from pageable memory the copy would be synchronous
    return values.to(device, non_blocking=True)
