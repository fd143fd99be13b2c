"""Optimiser, its parameter groups, and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from mpformer import plugin
from mpformer.config import Plugin, PolySchedule, StepSchedule
from mpformer.config import Train as TrainConfig
from mpformer.config.run import AnySchedule
from mpformer.config.section import Section
from mpformer.model.architecture import Architecture
from mpformer.types import InputError


class OptimizerStep(Protocol):
    """The contract of `train.optimizer`: a `torch.optim.Optimizer` whose step needs no closure.

    The class is called with the list of parameter groups, each with its 'lr' and 'weight_decay', and with
    the options as keyword arguments. Its state in `Optimizer.state` is tensors and numbers per parameter:
    checkpoints hold these and nothing else, so that a resumed run goes on bit for bit.
    """

    def step(self) -> Any:
        """Update the parameters from their gradients, which have been clipped."""


class Schedule(Protocol):
    """The contract of `train.schedule.kind`: a pure function, so that a resumed run needs no state of it."""

    def __call__(self, done: float) -> float:
        """The factor of all learning rates, at least 0, after the share `done` of training, 0 <= done < 1."""
        ...


def build_optimizer(model: Architecture, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser with the papers' groups: the backbone's rate scaled; no decay of norms, embeddings and
    tables.

    Each group keeps its own rate at factor 1 as `base_lr`. Raises `InputError` where a plug-in is no
    optimiser.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for entry in model.model_parameters():
        if entry.parameter.requires_grad:
            lr = config.lr * (config.backbone_lr_factor if entry.in_backbone else 1.0)
            decay = config.weight_decay if entry.decayed else 0.0
            groups.setdefault((lr, decay), []).append(entry.parameter)
    return _optimizer(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        config,
    )


def check_plugins(config: TrainConfig) -> None:
    """Raise `InputError` unless the plug-ins of schedule and optimiser fit their contracts."""
    schedule(config.schedule)
    if isinstance(config.optimizer, Plugin):
        weights = [nn.Parameter(torch.ones(shape)) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
        rates = {"lr": config.lr, "base_lr": config.lr, "weight_decay": config.weight_decay}
        optimizer = _optimizer([{"params": weights, **rates}], config)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        try:
            optimizer.step()
        except Exception as error:  # the optimiser's own code
            what = f"train.optimizer: {config.optimizer.kind}: a step fails"
            raise InputError(f"{what}: {plugin.described(error)}") from error


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if not isinstance(config.optimizer, Plugin):
        return torch.optim.AdamW(groups, fused=True)
    reference, options = config.optimizer.kind, config.optimizer.options
    found = plugin.build(reference, options, OptimizerStep, "train.optimizer", groups)
    if not isinstance(found, torch.optim.Optimizer):
        raise InputError(f"train.optimizer: {reference} is no torch.optim.Optimizer")
    return found


def schedule(config: AnySchedule) -> Schedule:
    """The schedule that the settings name; `InputError` for a plug-in that does not fit its contract."""
    if isinstance(config, Plugin):
        return plugin.shared(config.kind, config.options, Schedule, "train.schedule")
    return _SCHEDULES[type(config)](config)


def _step(config: StepSchedule) -> Schedule:
    return lambda done: config.factor ** sum(done >= at for at in config.at)


def _poly(config: PolySchedule) -> Schedule:
    return lambda done: (1.0 - done) ** config.power


_SCHEDULES: dict[type[Section], Callable[[Any], Schedule]] = {StepSchedule: _step, PolySchedule: _poly}
"""The schedule of each section of `train.schedule`."""


def rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The factor of the rates in the step-th of `steps` optimiser steps, counted from 0."""
    warm = min(1.0, (step + 1) / (config.warmup * steps)) if config.warmup else 1.0
    return warm * schedule(config.schedule)(step / steps)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its own base times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
