"""A run that goes on from a checkpoint of another one under changed settings (`train.resume_from`).

The other's checkpoint and its record up to there are put into the run's own folder. From then on it is a run
that was interrupted at that step: it resumes as any other, and the other run may go on, or be deleted.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from mpformer.config import Config, diff
from mpformer.data.catalog import check_same_classes
from mpformer.data.records import Catalog
from mpformer.model.weights.checkpoints import LAST, MODEL_FILE, STATE_FILE, Checkpoint, choose, read
from mpformer.model.weights.loading import read_metadata
from mpformer.tracking.lineage import Parent
from mpformer.tracking.record import inherit
from mpformer.tracking.run_dir import RunDir, partial_checkpoint, partial_checkpoints
from mpformer.train.job import StepPlan
from mpformer.types import InputError, RunError

_SAME = ("model.", "train.batch_size", "train.optimizer")
"""Settings that a checkpoint goes on with, or what they begin with."""


def begin(run_dir: Path, config: Config, train: Catalog) -> Checkpoint:
    """Give a run that has no checkpoint that of `train.resume_from`, to go on from.

    train: the training split. Raises `InputError` where there is no such checkpoint, and where the model's
    settings, its classes or what else belongs to its state differ; `RunError` for a damaged one.
    """
    found, parent_dir = _origin(config)
    _check_settings(config, found)
    check_same_classes(read_metadata(found.path / MODEL_FILE)[1], train.classes, train.name)
    length = StepPlan.of(config, len(train.records)).total
    if found.step >= length:
        raise InputError(
            f"train.length: {config.train.length} is {length} steps, and {found.path} is already at step "
            f"{found.step}: a longer one is expected"
        )
    inherit(run_dir, parent_dir, found.step)
    Parent(parent_dir.name, found.step).write(run_dir)
    _copy(found.path, RunDir(run_dir).checkpoint(found.step))
    return replace(found, path=RunDir(run_dir).checkpoint(found.step))


def _origin(config: Config) -> tuple[Checkpoint, Path]:
    """The checkpoint to go on from, and the folder of its run."""
    assert config.train.resume_from is not None
    place = Path(os.path.expanduser(config.train.resume_from)).resolve()
    if place.is_dir() and not (place / STATE_FILE).is_file():
        place = place.with_name(place.name + LAST)  # the newest one, not the best
    try:
        folder = choose(place).file.parent
    except InputError as error:
        raise InputError(f"train.resume_from: {error}") from None
    run = RunDir.containing(folder / MODEL_FILE)
    if run is None or not (folder / STATE_FILE).is_file():
        raise InputError(
            f"train.resume_from: {folder}: a run, or a checkpoint in the folder of one, is expected; "
            "train.init takes over weights alone"
        )
    return read(folder), run.path


def _check_settings(config: Config, found: Checkpoint) -> None:
    theirs, _ = read_metadata(found.path / MODEL_FILE)
    images = theirs.model.backbone
    if config.model.backbone.mean is None:  # by default what belongs to the weights, which are theirs
        own = config.model.with_backbone(mean=images.mean, std=images.std)
        config = config.model_copy(update={"model": own})
    ours, theirs = (c.model_copy(update={"model": c.model.without_pretrained()}) for c in (config, theirs))
    for key, (own, other) in diff(ours, theirs).items():
        if key.startswith(_SAME):
            raise InputError(
                f"train.resume_from: {key} is {own} here and {other} in {found.path}: a run goes on with "
                "its own model, optimiser and batch size; train.init takes over the weights that fit"
            )


def _copy(source: Path, target: Path) -> None:
    """A checkpoint under another run: hard links where that is possible. It appears when complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial_checkpoints(target.parent):
        shutil.rmtree(leftover)
    partial = partial_checkpoint(target)
    partial.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, partial / file.name)
        except FileNotFoundError:
            raise RunError(f"{source}: its run has just replaced it by a newer one; try again") from None
        except OSError:  # another file system, or one without links
            shutil.copy2(file, partial / file.name)
    if target.exists():  # damaged
        shutil.rmtree(target)
    partial.rename(target)
