"""Which checkpoint of a run is read: the best or the newest, of those whose files are what was written.

`RUN/checkpoints/step-00000400/` holds `model.safetensors`, `optimizer.safetensors` and `state.json` with
their SHA-256 digests, and with `train.ema` the averaged weights as `ema.safetensors`;
`mpformer.train.checkpoint` writes it. Training, evaluation, prediction and export ask here alone. Training
goes on from the newest checkpoint; everybody else takes the best one where the run keeps it
(`train.keep.best`), and the newest one as `RUN@last`. The figures that decide are those of the run's record.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer.config import figures, load_config
from mpformer.config.figures import AVERAGED, higher_is_better
from mpformer.config.run import Keep
from mpformer.config.yamlfile import nearest_path
from mpformer.model.weights.filekind import container_of
from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir, step_of
from mpformer.types import InputError, RunError

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
BEST, LAST = "@best", "@last"
"""What may stand behind a run's folder, to name one of its checkpoints."""


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


@dataclass(frozen=True)
class Choice:
    """The model file that a path stands for."""

    file: Path
    note: str = ""
    """One line on a choice among the checkpoints of a run; empty where there was none to make."""


def choose(path: Path) -> Choice:
    """The model file meant by a path: the file itself, that of a checkpoint's folder, or that of a run.

    Of a run with `train.keep.best` it is the best checkpoint's (its averaged weights where the figure is of
    them), else the newest one's; `RUN@best` and `RUN@last` ask for one of the two. In a run, damaged
    checkpoints are passed over with a warning. Raises `InputError` where there is no checkpoint, no undamaged
    one, or a file that cannot hold tensors.
    """
    if path.is_file():
        container_of(path)
        return Choice(path)
    if (path / MODEL_FILE).is_file():
        if (path / STATE_FILE).is_file():
            try:
                read(path)
            except RunError as error:
                raise InputError(str(error)) from None
        container_of(path / MODEL_FILE)
        return Choice(path / MODEL_FILE)
    run, asked = _split(path)
    found_best = None if asked == LAST else best(run)
    if found_best is not None:
        return found_best
    if asked == BEST:
        raise InputError(f"{path}: no best checkpoint: train.keep.best names the figure that decides")
    found, damaged = latest(run)
    for line in damaged:
        log.warning("%s. The checkpoint before is used", line)
    if found is not None:
        return Choice(found.path / MODEL_FILE)
    if damaged:
        raise InputError(f"{run}: no undamaged checkpoint: {damaged[0]}")
    raise InputError(
        f"{run}: no checkpoint: expected {MODEL_FILE}, its folder, or a run with checkpoints/{_instead(run)}"
    )


def _split(path: Path) -> tuple[Path, str | None]:
    """The run, and which of its checkpoints a path asks for by `@best` or `@last`."""
    for which in (BEST, LAST):
        if path.name.endswith(which) and path.name != which and not path.exists():
            return path.with_name(path.name.removesuffix(which)), which
    return path, None


def best(run_dir: Path) -> Choice | None:
    """The best undamaged checkpoint of a run; None where the run keeps none, or has no figure of one."""
    if (figure := kept_best(run_dir)) is None:
        return None
    folders = {step: path for path in complete(run_dir) if (step := step_of(path)) is not None}
    for step, value in ranked(run_dir, figure, folders):
        try:
            read(folders[step])
        except RunError as error:
            log.warning("%s. The next best checkpoint is used", error)
            continue
        file = folders[step] / (EMA_FILE if figure.startswith(AVERAGED) else MODEL_FILE)
        shown = f"{value:.1f}" if higher_is_better(figure) else f"{value:.3f}"
        which = f"best checkpoint: step {step} of {max(folders)}, {figure} {shown}"
        return Choice(file, f"{which}; {run_dir}{LAST} for the last")
    return None


def kept_best(run_dir: Path) -> str | None:
    """The figure whose best checkpoint a run keeps (`train.keep.best`), by the settings in its folder."""
    file = RunDir(run_dir).config
    if not file.is_file():
        return None
    try:
        return load_config(file).train.keep.best
    except InputError as error:
        log.warning("%s. The newest checkpoint is used, not the best", error)
        return None


def ranked(run_dir: Path, figure: str, steps: Collection[int]) -> list[tuple[int, float]]:
    """`figures.ranked` for those of the steps at which a run's record has the figure."""
    points = (point for point in read_points(run_dir) if point.step in steps)
    return figures.ranked(figure, ((p.step, p.values[figure]) for p in points if figure in p.values))


def superseded(run_dir: Path, keep: Keep) -> list[Path]:
    """The checkpoints that a run need not keep: neither among the newest nor the best.

    One that is being evaluated in the background may turn out to be the best.
    """
    older = complete(run_dir)[: -keep.last]
    if keep.best is None:
        return older
    steps = [step for path in complete(run_dir) if (step := step_of(path)) is not None]
    order = ranked(run_dir, keep.best, steps)
    measured = {step for step, _ in order}
    needed = {step for step, _ in order[:1]} | (RunDir(run_dir).waiting_evaluations().keys() - measured)
    return [path for path in older if step_of(path) not in needed]


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
