"""The metrics that a column of a study may name, by the task of the model that it comes from. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mpformer.ablation.studyfile import StudyFile, split_column
from mpformer.config.figures import AVERAGED, FIGURES, LOSSES, PLAIN
from mpformer.config.yamlfile import Source, nearest
from mpformer.types import InputError, Task

_SPEED = (
    *("images_per_second", "images_seen", "train_seconds", "gpu_hours", "clock_hours"),
    *("mfu", "peak_memory_gib"),
)
_LAYERS = ("layer_iou", "query_utilization", "pilot_layer_iou", "pilot_query_utilization")


def check_columns(source: Source, file: StudyFile, tasks: Mapping[str, Task]) -> None:
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


def _fixed(task: Task) -> Iterator[str]:
    yield from (f"{kind}{name}" for kind in (PLAIN, AVERAGED) for name in (*FIGURES[task], *LOSSES))
    yield from (f"speed/{name}" for name in _SPEED)
