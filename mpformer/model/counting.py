"""Parameters and FLOPs of a model, counted as the papers' tables count them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpformer.config.model import Model as ModelConfig
from mpformer.model.architecture import Architecture, build_model
from mpformer.types import Pilots


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    parameters: int
    """All parameters, also of what only training uses; buffers such as frozen statistics are none."""
    flops: int
    """Multiply-adds of convolutions, linear layers and matrix products of one inference, one image."""
    flops_by_part: dict[str, int]
    """The same for each part of the model (backbone, pixel_decoder, decoder) and, in semantic segmentation,
    inference."""


def count_size(config: ModelConfig, classes: int, height: int, width: int, task: str = "instance") -> Size:
    """Parameters, and FLOPs for an image of height x width (multiples of 32).

    The model is built without memory for its weights, so any size of it is counted in seconds. Sampling in
    deformable attention, norms and activations are not counted. In semantic segmentation the product of all
    queries' class and mask probabilities at full size is: with it the figures are those of Mask2Former's
    Table V, without it those of its other tables.
    """
    with torch.device("meta"):
        model = build_model(config.without_pretrained(), classes).eval()
        images = torch.zeros(1, 3, height, width)
    parameters = count_parameters(model)
    model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images)
    by_module = counter.get_flop_counts()
    parts = {
        part: sum(by_module.get(f"{type(model).__name__}.{part}", {}).values()) // 2
        for part, _ in model.named_children()
    }
    if task == "semantic" and not model.structure.per_pixel:
        parts["inference"] = model.structure.queries * classes * height * width
    return Size(parameters, sum(parts.values()), parts)


def count_training_flops(model: Architecture, height: int, width: int) -> int:
    """FLOPs of forward and backward of one image of height x width (multiples of 32) in training.

    An addition and a multiplication are two, as the peaks of cards are stated. All heads and a full set of
    pilots are counted, losses and what `count_size` leaves out are not, nor what activation checkpointing
    computes twice. `model` is only read: a copy of its design, without memory for weights, is run.
    """
    with torch.device("meta"):
        copy = build_model(model.config.without_pretrained(), model.classes).train()
        images = torch.zeros(1, 3, height, width)
        slots = model.config.pilot.queries if model.structure.takes_pilots else 0
        pilots = _full_pilots(slots, len(model.structure.attention_strides)) if slots else None
    with FlopCounterMode(display=False) as counter:
        output = copy(images, pilots)
        parts = [part for head in (*output.heads, *(output.pilots or ())) for part in vars(head).values()]
        torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    return counter.get_total_flops()


def _full_pilots(slots: int, layers: int) -> Pilots:
    """One image's pilots in one group; attention masks change no count."""
    number = torch.zeros(1, slots, dtype=torch.long)
    return Pilots(number, number, number, (slots,), (None,) * layers)


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model."""
    return sum(p.numel() for p in model.parameters())
