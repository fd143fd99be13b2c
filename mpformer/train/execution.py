"""How a model is executed in training: compiled, with activation checkpointing, in which precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from mpformer.config import Train as TrainConfig
from mpformer.model.architecture import Architecture


def prepare(model: Architecture, config: TrainConfig) -> None:
    """Apply `train.channels_last`, `activation_checkpointing` and `compile` to a model, in place.

    None of them changes what the model computes; parameters keep names and layout. A part is compiled for the
    first shape that it gets and once more for dynamic shapes; fixed crops need no more than that.
    """
    if config.channels_last:
        model.use_channels_last()
    if config.activation_checkpointing:
        for layer in model.checkpointed_layers():
            layer.forward = _checkpointed(layer.forward)  # parameters keep their names
    if config.compile:
        for part in model.compiled_parts():
            part.compile()


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the forward runs in bfloat16 autocast: as set, or with `auto` on GPUs that support it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


def _checkpointed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A layer's forward that keeps only its inputs for the backward pass."""

    def run(*inputs: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run
