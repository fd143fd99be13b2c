"""The plan of a study, before anything starts: rows, runs, hours, price. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpformer.ablation.cost import Costs, PlanOptions, cost_lines
from mpformer.ablation.spec import Study, Trial
from mpformer.capacity import Capacity
from mpformer.config import Config, diff
from mpformer.types import InputError


def plan_text(study: Study, only: str | None = None) -> str:
    """Rows x seeds, what each row changes against the common base, the runs, their steps, hours and state.

    Raises `InputError` for an unknown row in `only` and for an unknown `plan.KEY`.
    """
    options = PlanOptions.read(study.options)
    costs = Costs.read(study, options)
    trials = study.trials(only)
    rows = list(dict.fromkeys(trial.row for trial in trials))
    width = max(len(key) for row in rows for key in [*changes(study, row), ""])
    lines = [f"{study.name}: {study.file.title}", ""]
    for row in rows:
        lines += _row_lines(study, row, width)
    lines += ["", _count_line(study, trials, costs), *cost_lines(trials, costs, options)]
    lines.append(f"in {study.folder}: {state_text(trials)}")
    return "\n".join(lines)


def _row_lines(study: Study, row: str, width: int) -> list[str]:
    """What a row changes, its keys padded to `width`, and how long it trains."""
    mark = " (baseline)" if row == study.file.baseline else ""
    title = f": {study.title(row)}" if study.title(row) != row else ""
    lines = [f"  {row}{title}{mark}"]
    changed = changes(study, row)
    lines += [f"      {key:{width}}  {show_value(a)} -> {show_value(b)}" for key, (a, b) in changed.items()]
    if not changed:
        lines.append("      the base as it is")
    lengths = {part: _length(study.runs[row, part]) for part in study.file.parts_of(row)}
    if len(set(lengths.values())) > 1:
        return lines + [f"      length {length}, {part}" for part, length in lengths.items()]
    first, *_ = lengths
    each = f", each of {', '.join(lengths)}" if first else ""
    return [*lines, f"      length {lengths[first]}{each}"]


def _count_line(study: Study, trials: Sequence[Trial], costs: Costs) -> str:
    """The number of runs and, where the lengths of all are known, of steps and images."""
    rows = len({trial.row for trial in trials})
    seeds = ", ".join(map(str, study.seeds))
    parts = f" x {len(study.file.bases)} parts" if len(study.file.bases) > 1 else ""
    text = f"rows x seeds: {rows} x {len(study.seeds)} (seeds {seeds}){parts} = {len(trials)} runs"
    if study.file.search:
        text += f", then {study.file.search.samples} samples of the search"
    steps = [known for trial in trials if (known := costs.steps(trial.config)) is not None]
    if len(steps) == len(trials):
        images = sum(n * trial.config.train.batch_size for n, trial in zip(steps, trials))
        text += f", {sum(steps):,} steps, {images:,} images"
    return text


def changes(study: Study, row: str) -> dict[str, tuple[Any, Any]]:
    """Settings in which a row differs from the common base: {dotted key: (base, row)}.

    Where its parts differ in different ways, the key is followed by the part's name.
    """
    by_part = {part: diff(study.bases[part], study.runs[row, part]) for part in study.file.parts_of(row)}
    found: dict[str, tuple[Any, Any]] = {}
    for part, changed in by_part.items():
        for key, values in changed.items():
            everywhere = all(other.get(key) == values for other in by_part.values())
            found[key if everywhere else f"{key} ({part})"] = values
    return found


def state_text(trials: list[Trial]) -> str:
    """How many of the runs are finished, begun and not yet begun."""
    finished = sum(trial.finished for trial in trials)
    begun = sum(trial.run_dir.exists() and not trial.finished for trial in trials)
    return f"{finished} finished, {begun} begun, {len(trials) - finished - begun} to start"


def _length(config: Config) -> str:
    return f"{config.train.length} of {config.train.batch_size} images"


def show_value(value: Any) -> str:
    """The value of a setting as a settings file has it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(show_value, value)) + "]"
    return "null" if value is None else str(value)


def trials_at_once(trials: Sequence[Trial], capacity: Capacity) -> int:
    """How many trials of a study fit into the cluster together, at least 1 and at most all.

    Raises `InputError`, with the row and the arithmetic, for a trial that does not fit even alone.
    """
    return min(len(trials), *(_copies(trial, capacity) for trial in trials))


def _copies(trial: Trial, capacity: Capacity) -> int:
    try:
        return capacity.runs_at_once(trial.config)
    except InputError as error:
        raise InputError(f"row {trial.row} cannot run here: {error}") from None
