"""The metrics that a column of a study may name, by the task of the model that it comes from. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mpformer.ablation.studyfile import StudyFile, split_column
from mpformer.config.yamlfile import Source, nearest
from mpformer.types import InputError

_PRECISION = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_RECALL = ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
_INSTANCE = (*_PRECISION, *(name.replace("AP", "AP_boundary") for name in _PRECISION), *_RECALL)
_PIXELS = ("mIoU", "pixel_accuracy", "class_accuracy")
_QUALITY = ("PQ", "SQ", "RQ")
FIGURES = {
    "instance": _INSTANCE,
    "panoptic": (
        *(name + kind for name in _QUALITY for kind in ("", "_things", "_stuff")),
        *_PIXELS,
        *_INSTANCE,
    ),
    "semantic": (*_PIXELS, *(f"{name}_stuff" for name in _QUALITY)),
}
"""What an evaluation of a task measures (`mpformer.evaluate.metrics.score`), as `val/NAME`."""
_SPEED = (
    *("images_per_second", "images_seen", "train_seconds", "gpu_hours", "clock_hours"),
    *("mfu", "peak_memory_gib"),
)
_LAYERS = ("layer_iou", "query_utilization", "pilot_layer_iou", "pilot_query_utilization")


def check_columns(source: Source, file: StudyFile, tasks: Mapping[str, str]) -> None:
    """Raise `InputError`, with the nearest right name, for a column that no run of its part would measure.

    `tasks`: by part, what its models are evaluated on.
    """
    for column in file.columns:
        part, metric = split_column(column)
        if metric in _fixed(tasks[part]) or re.fullmatch(rf"diag/({'|'.join(_LAYERS)})_\d+", metric):
            continue
        known = [*_fixed(tasks[part]), *(f"diag/{name}_1" for name in _LAYERS)]
        raise InputError(
            f"{source.place(['columns', column])}: columns.{column}: no metric '{metric}' of the task "
            f"'{tasks[part]}'; nearest: {nearest(metric, known)}"
        )


def _fixed(task: str) -> Iterator[str]:
    yield from (f"val/{name}" for name in FIGURES[task])
    yield from (f"speed/{name}" for name in _SPEED)
