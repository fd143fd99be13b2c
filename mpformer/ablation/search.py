"""The search of a study: samples of a space of settings, each a run like any other. No torch, no ray."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpformer.ablation.spec import Study, Trial
from mpformer.ablation.studyfile import Choice, Integers, LogUniform, Search, Uniform, split_column
from mpformer.ablation.tables import figure_text, markdown_table
from mpformer.config.figures import higher_is_better
from mpformer.tracking.run_dir import RunDir


@dataclass(frozen=True)
class Sample:
    """A point of the space, and its run."""

    settings: Mapping[str, Any]
    trial: Trial

    @property
    def stopped_at(self) -> int | None:
        """The step at which the scheduler stopped the run."""
        path = RunDir(self.trial.run_dir).stopped
        return json.loads(path.read_text())["step"] if path.exists() else None


def draw(search: Search) -> list[dict[str, Any]]:
    """The points of a random search: the same at every call, those of fewer samples the first of more."""
    points = []
    for number in range(search.samples):
        random = np.random.Generator(np.random.Philox(key=[search.seed, number]))
        points.append({key: _value(space, random) for key, space in search.space.items()})
    return points


def _value(space: Choice | Uniform | LogUniform | Integers, random: np.random.Generator) -> Any:
    match space:
        case Choice(choice=values):
            return values[int(random.integers(len(values)))]
        case Uniform(uniform=(low, high)):
            return float(random.uniform(low, high))
        case LogUniform(loguniform=(low, high)):
            return float(np.exp(random.uniform(np.log(low), np.log(high))))
        case Integers(integers=(low, high)):
            return int(random.integers(low, high, endpoint=True))


def samples(study: Study) -> list[Sample]:
    """The samples of a study's random search, in their order, on its first seed; none without a search."""
    search = study.file.search
    return [] if search is None else [_sample(study, search, *point) for point in enumerate(draw(search))]


def _sample(study: Study, search: Search, number: int, settings: Mapping[str, Any]) -> Sample:
    """The searched row with the settings of a point."""
    part, _ = split_column(search.column)
    name = f"sample-{number:03d}"
    return Sample(settings, study.varied(name, search.row, part, settings, study.seeds[0]))


def table(found: Sequence[tuple[Sample, float | None]], column: str, title: str) -> str:
    """The samples and their values of a column as Markdown, best first; a stopped one shows its last step."""
    if not found:
        return "no samples yet"
    lines = [["sample", *found[0][0].settings, title]]
    sign = -1 if higher_is_better(split_column(column)[1]) else 1
    best_first = sorted(found, key=lambda one: math.inf if one[1] is None else sign * one[1])
    for one, value in best_first:
        shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in one.settings.values()]
        stopped = value is None and one.stopped_at is not None
        figure = f"stopped at step {one.stopped_at}" if stopped else figure_text(value, 2)
        lines.append([one.trial.config.name, *shown, figure])
    return "\n".join(markdown_table(lines))
