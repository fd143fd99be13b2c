"""Weights files: our own checkpoints in, nothing executed on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mpformer.config import Config
from mpformer.model.segmenter import Segmenter, build_model
from mpformer.types import ClassTable, InputError

MODEL_FILE = "model.safetensors"
_FORMAT = "mpformer-1"


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did with each tensor, by name."""

    loaded: tuple[str, ...]
    reinitialized: tuple[str, ...]
    """In the model but absent from the file, or of another shape there: left as they were."""
    left_over: tuple[str, ...]
    """In the file but not in the model."""

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("re-initialised", self.reinitialized), ("left over", self.left_over)):
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(names)}")
        return "\n".join(lines)


def checkpoint_metadata(config: Config, classes: ClassTable) -> dict[str, str]:
    """The header of a checkpoint's model file: resolved settings and class table as JSON."""
    return {
        "format": _FORMAT,
        "config": config.model_dump_json(),
        "classes": json.dumps(classes.to_dict()),
    }


def model_file(path: Path) -> Path:
    """The model file meant by a path: the file itself, a checkpoint folder, or a run's newest checkpoint."""
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    found = sorted(path.glob(f"checkpoints/step-*/{MODEL_FILE}"))
    if found:
        return found[-1]
    raise InputError(f"{path}: no checkpoint: expected {MODEL_FILE}, its folder, or a run with checkpoints/")


def read_metadata(file: Path) -> tuple[Config, ClassTable]:
    """Settings and class table of a checkpoint's model file."""
    try:
        with safe_open(file, "pt") as tensors:
            header = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from None
    if header.get("format") != _FORMAT:
        raise InputError(f"{file}: no mpformer checkpoint (its header lacks settings and class table)")
    config = Config.model_validate_json(header["config"])
    return config, ClassTable.from_dict(json.loads(header["classes"]))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[Segmenter, Config]:
    """The model of a checkpoint in evaluation mode, and its settings.

    `path`: a run, a checkpoint folder or its model file. Raises `InputError` for anything else.
    """
    file = model_file(Path(path))
    config, classes = read_metadata(file)
    # every weight comes from the file: nothing to fetch for the backbone
    backbone = config.model.backbone.model_copy(update={"pretrained": None})
    model = build_model(config.model.model_copy(update={"backbone": backbone}), classes)
    model.load_state_dict(load_file(file))
    return model.to(device).eval(), config


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load a safetensors file of our names into a model as far as names and shapes fit.

    Raises `InputError` where nothing fits.
    """
    file = model_file(Path(path))
    try:
        stored: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from None
    own = model.state_dict()
    fitting = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise InputError(f"{file}: none of its {len(stored)} tensors fits the model")
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        tuple(fitting), tuple(k for k in own if k not in fitting), tuple(k for k in stored if k not in own)
    )
