"""A study's search: samples of a space of settings, each a run like any other. No torch, no ray."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpformer.ablation.spec import Study, Trial
from mpformer.ablation.studyfile import Choice, Integers, LogUniform, Search, Uniform, split_column
from mpformer.tracking.run_dir import RunDir


@dataclass(frozen=True)
class Sample:
    """A point of the space, and its run."""

    settings: Mapping[str, Any]
    trial: Trial

    @property
    def stopped_at(self) -> int | None:
        """The step at which the run was given up."""
        path = RunDir(self.trial.run_dir).stopped
        return json.loads(path.read_text())["step"] if path.exists() else None


def draw(search: Search) -> list[dict[str, Any]]:
    """The points of a random search: the same at every call, and fewer samples are the first of more."""
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


def sample(study: Study, settings: Mapping[str, Any], number: int) -> Sample:
    """The run of a point: the searched row with its settings, on the study's first seed."""
    search = study.file.search
    part, _ = split_column(search.column)
    name = f"sample-{number:03d}"
    return Sample(settings, study.varied(name, search.row, part, settings, study.seeds[0]))


def samples(study: Study) -> list[Sample]:
    """The samples of a random search, in their order."""
    return [sample(study, settings, number) for number, settings in enumerate(draw(study.file.search))]


def table(found: Sequence[tuple[Sample, float | None]], metric: str) -> str:
    """The samples as Markdown, best first; those that were stopped early have no figure."""
    if not found:
        return "no samples yet"
    keys = list(found[0][0].settings)
    lines = ["| " + " | ".join(["sample", *keys, metric]) + " |", "|---" * (len(keys) + 2) + "|"]
    best_first = sorted(found, key=lambda one: -float("inf") if one[1] is None else one[1], reverse=True)
    for one, value in best_first:
        shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in one.settings.values()]
        figure = f"{value:.2f}" if value is not None else "–"
        if value is None and one.stopped_at is not None:
            figure = f"stopped at step {one.stopped_at}"
        lines.append("| " + " | ".join([one.trial.config.name, *shown, figure]) + " |")
    return "\n".join(lines)
