"""Parameter groups and learning-rate schedules of the papers' recipes."""

from __future__ import annotations

import torch
from torch import nn

from mpformer.config import PolySchedule, StepSchedule
from mpformer.config import Train as TrainConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the papers' groups: the backbone's rate scaled; no decay of norms, embeddings and tables.

    Each group keeps its own rate at factor 1 as `base_lr`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            undecayed = isinstance(module, (*_NORMS, nn.Embedding)) or name in _TABLES
            in_backbone = module_name.split(".")[0] == "backbone"
            lr = config.lr * (config.backbone_lr_factor if in_backbone else 1.0)
            groups.setdefault((lr, 0.0 if undecayed else config.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,
    )


def rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """What the rates are multiplied by in the step-th of `steps` optimiser steps (counted from 0)."""
    done = step / steps
    warm = min(1.0, (step + 1) / (config.warmup * steps)) if config.warmup else 1.0
    schedule = config.schedule
    if isinstance(schedule, PolySchedule):
        return warm * (1.0 - done) ** schedule.power
    assert isinstance(schedule, StepSchedule)
    return warm * schedule.factor ** sum(done >= at for at in schedule.at)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its own base times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
