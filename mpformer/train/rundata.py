"""What data a run was begun on: written to its folder once, compared whenever its command is given again."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.data.catalog import check_same_classes
from mpformer.data.version import SPLITS, DataVersion, changes
from mpformer.model.weights.checkpoints import MODEL_FILE, Checkpoint
from mpformer.tracking.run_dir import RunDir
from mpformer.types import InputError

log = logging.getLogger(__name__)

FORMAT = 1


class ChangedDataError(InputError):
    """A run's data are not those that it was begun on; the message says what has changed."""


def settle(run_dir: Path, version: DataVersion, begun: Checkpoint | None) -> dict[str, str]:
    """Compare the data with those that the run was begun on, or write down what they are.

    begun: the checkpoint that the run goes on from. A run without one begins anew, on the data as they are.
    For one of an older version, which kept no record of data, they are written down now. Returns the run's
    tags of its data. Raises `ChangedDataError`. The run's lock must be held.
    """
    before = _read(run_dir)
    if before is not None and begun is not None:
        now = _compare(run_dir, version, before)
    else:
        if begun is not None:
            _check_classes(begun, version)
        now = {split: version.describe(split) for split in SPLITS}
        if before is not None and any(changes(split, before[split], now[split]) for split in SPLITS):
            log.warning("%s has no checkpoint yet: it begins on the data as they are now", run_dir.name)
        atomic.write_text(RunDir(run_dir).data, json.dumps({"format": FORMAT, **now}))
    return version.tags(now)


def check(run_dir: Path, version: DataVersion) -> str | None:
    """Compare the data with those that a run was begun on.

    None where they are the same; why they cannot be compared otherwise. Raises `ChangedDataError`.
    """
    if (before := _read(run_dir)) is None:
        return "its data were not compared: it was begun by a version of mpformer that kept no record of them"
    try:
        _compare(run_dir, version, before)
    except ChangedDataError:
        raise
    except InputError as error:
        return f"its data were not there to compare: {error}"
    return None


def changed_data(run_dir: Path, version: DataVersion, splits: Sequence[str] = SPLITS) -> str:
    """What has changed in the data since the run was begun, in words; empty for nothing, or without a record.

    Raises `InputError` where the data cannot be read.
    """
    before = _read(run_dir)
    if before is None:
        return ""
    found = (changes(split, before[split], version.compared(split, before[split])) for split in splits)
    return "; ".join(text for text in found if text)


def _compare(run_dir: Path, version: DataVersion, before: dict[str, Any]) -> dict[str, Any]:
    now = {split: version.compared(split, before[split]) for split in SPLITS}
    found = [text for split in SPLITS if (text := changes(split, before[split], now[split]))]
    if found:
        raise ChangedDataError(f"{run_dir} was begun on other data: {'; '.join(dict.fromkeys(found))}")
    return now


def _read(run_dir: Path) -> dict[str, Any] | None:
    path = RunDir(run_dir).data
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a record of data that this version of mpformer writes")
    return content


def _check_classes(begun: Checkpoint, version: DataVersion) -> None:
    """Of a run without a record of its data, the checkpoint at least knows the classes."""
    from mpformer.model.weights.loading import read_metadata  # it builds models

    _, classes = read_metadata(begun.path / MODEL_FILE)
    split = version.open("train")
    check_same_classes(classes, split.classes, split.name)
