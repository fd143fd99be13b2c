"""Which checkpoint of a run is read: the newest whose files are what was written.

`RUN/checkpoints/step-00000400/` holds `model.safetensors`, `optimizer.safetensors` and `state.json` with
their SHA-256 digests; `mpformer.train.checkpoint` writes it. Training, evaluation, prediction and export ask
here alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer.config.yamlfile import nearest_path
from mpformer.model.weights.filekind import container_of
from mpformer.tracking.run_dir import RunDir, step_of
from mpformer.types import InputError, RunError

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete and undamaged checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]
    """The content of `state.json`: what the run has stored, 'step', 'batch_size' and 'sha256'."""


def complete(run_dir: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first. Their content is not looked at."""
    folder = RunDir(run_dir).checkpoints
    return sorted(p for p in folder.iterdir() if step_of(p) is not None) if folder.is_dir() else []


def latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and one line for each newer one, saying how it is damaged."""
    damaged: list[str] = []
    for path in reversed(complete(run_dir)):
        try:
            return read(path), damaged
        except RunError as error:
            damaged.append(str(error))
    return None, damaged


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises `RunError` where a file is missing or not what was written."""
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in content["sha256"].items():
            if digest(path / name) != expected:
                raise RunError(f"{path / name}: damaged: its content is not what was written")
        return Checkpoint(path, content["step"], content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: damaged: {error}") from None


def model_file(path: Path) -> Path:
    """The model file meant by a path: the file itself, a checkpoint's folder, or a run's newest checkpoint.

    In a run, damaged checkpoints are passed over with a warning. Raises `InputError` where there is no
    checkpoint, no undamaged one, or a file that cannot hold tensors.
    """
    if path.is_file():
        container_of(path)
        return path
    if (path / MODEL_FILE).is_file():
        if (path / STATE_FILE).is_file():
            try:
                read(path)
            except RunError as error:
                raise InputError(str(error)) from None
        container_of(path / MODEL_FILE)
        return path / MODEL_FILE
    found, damaged = latest(path)
    for line in damaged:
        log.warning("%s. The checkpoint before is used", line)
    if found is not None:
        return found.path / MODEL_FILE
    if damaged:
        raise InputError(f"{path}: no undamaged checkpoint: {damaged[0]}")
    raise InputError(
        f"{path}: no checkpoint: expected {MODEL_FILE}, its folder, or a run with checkpoints/"
        f"{_instead(path)}"
    )


def _instead(path: Path) -> str:
    """The end of a message on a path that is none: what it is, or the nearest there is."""
    if (path / "config.json").is_file():
        return (
            "; it is a Hugging Face folder: `mpformer weights import FOLDER OUT.safetensors` makes one of it"
        )
    if path.is_dir():
        return ""
    return nearest_path(path) or nearest_path(path, folder=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
