"""Write and restore the checkpoints of a run: safetensors and JSON, no pickle, renamed into place.

`RUN/checkpoints/step-00000400/` holds `model.safetensors` (with the resolved settings and the class table in
its header, so that the file alone can be evaluated), with `train.ema` the same of the averaged weights as
`ema.safetensors`, `optimizer.safetensors` and `state.json`. The data position, the schedule and all random
streams are functions of (seed, step); the step is therefore the only state besides the tensors. Which
checkpoint is read: `mpformer.model.weights.checkpoints`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mpformer import atomic
from mpformer.config import Config
from mpformer.model.architecture import Architecture
from mpformer.model.weights.checkpoints import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Checkpoint,
    digest,
    superseded,
)
from mpformer.model.weights.loading import checkpoint_metadata
from mpformer.tracking.run_dir import RunDir, partial_checkpoint, partial_checkpoints
from mpformer.train.ema import WeightAverage
from mpformer.types import InputError, RunError

_NUMBERS = "numbers"
"""Key, in the header of the optimiser's file, of the state that is numbers."""


def save(
    run_dir: Path,
    step: int,
    model: Architecture,
    optimizer: torch.optim.Optimizer,
    config: Config,
    state: dict[str, Any],
    average: WeightAverage | None = None,
) -> Checkpoint:
    """Write the checkpoint of `step`, then delete those that `train.keep` does not keep.

    The checkpoint appears under its name only when every byte of it is on disk. Raises `RunError` where it
    cannot be written; older checkpoints are then still there.
    """
    folder = RunDir(run_dir).checkpoints
    final = RunDir(run_dir).checkpoint(step)
    partial = partial_checkpoint(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in partial_checkpoints(folder):
            shutil.rmtree(leftover)
        partial.mkdir()
        _write_model(partial / MODEL_FILE, model.state_dict(), model, config)
        if average is not None:
            _write_model(partial / EMA_FILE, average.state_dict(), model, config)
        _write_optimizer(partial / OPTIMIZER_FILE, model, optimizer)
        content = {
            **state,
            "step": step,
            "batch_size": config.train.batch_size,
            "sha256": {f.name: digest(f) for f in sorted(partial.iterdir())},
        }
        (partial / STATE_FILE).write_text(json.dumps(content, indent=1))
        for file in partial.iterdir():
            atomic.flush(file)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        atomic.flush(folder)
        for old in superseded(run_dir, config.train.keep):
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        shutil.rmtree(partial, ignore_errors=True)  # makes room for the note of the failure
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{final}: the checkpoint cannot be written: {reason}") from error
    return Checkpoint(final, step, content)


def save_weights(path: Path, model: Architecture, config: Config) -> None:
    """Write the weights alone; the file appears when complete. Raises `RunError` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path, durable=True) as partial:
            _write_model(partial, model.state_dict(), model, config)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: the weights cannot be written: {reason}") from error


def restore(checkpoint: Checkpoint, model: Architecture, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimiser state in place. Raises `InputError` for those of another model."""
    device = str(next(model.parameters()).device)
    try:
        model.load_state_dict(load_file(checkpoint.path / MODEL_FILE, device=device))
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip()
        raise InputError(f"{checkpoint.path}: the weights are of another model: {line}") from None
    _read_optimizer(checkpoint.path / OPTIMIZER_FILE, model, optimizer)


def restored_average(checkpoint: Checkpoint | None, model: Architecture, decay: float) -> WeightAverage:
    """The average of a model's weights, gone on with where a checkpoint has one, else begun."""
    average = WeightAverage(model, decay)
    if checkpoint is not None and (file := checkpoint.path / EMA_FILE).is_file():
        average.load(load_file(file, device=str(next(model.parameters()).device)))
    return average


def _write_model(
    path: Path, tensors: Mapping[str, torch.Tensor], model: Architecture, config: Config
) -> None:
    content = {k: v.detach().contiguous() for k, v in tensors.items()}
    images = model.config.backbone  # what they are normalised with belongs to the weights
    own = config.model.with_backbone(mean=images.mean, std=images.std)
    described = config.model_copy(update={"model": own})
    save_file(content, path, checkpoint_metadata(described, model.classes))


def _write_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """State by parameter name, so that old checkpoints do not depend on the order of groups."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float | None] = {}
    for parameter_name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{parameter_name}/{key}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value.detach().contiguous()
            elif isinstance(value, int | float | None):
                numbers[name] = value
            else:
                kind = type(value).__name__
                raise InputError(f"train.optimizer: its state '{key}' is a {kind}: tensor or number expected")
    save_file(tensors, path, {_NUMBERS: json.dumps(numbers)} if numbers else None)


def _read_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser moves its state where it wants it: some keep the step number on the host."""
    entries: dict[str, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        stored |= json.loads((file.metadata() or {}).get(_NUMBERS, "{}"))
    for name, value in stored.items():
        parameter, _, key = name.rpartition("/")
        entries.setdefault(parameter, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    content = optimizer.state_dict()
    # a state dict counts parameters over all groups
    ordered = (parameter for group in optimizer.param_groups for parameter in group["params"])
    content["state"] = {
        index: entries[names[parameter]]
        for index, parameter in enumerate(ordered)
        if names[parameter] in entries
    }
    optimizer.load_state_dict(content)
