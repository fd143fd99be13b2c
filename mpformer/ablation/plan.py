"""What a study is going to do, before anything of it is started. Imports neither torch nor ray."""

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

    Raises `InputError` where there is no row `only`, and for a `plan.KEY` that is none.
    """
    options = PlanOptions.read(study.options)
    costs = Costs.read(study, options)
    trials = study.trials(only)
    rows = list(dict.fromkeys(trial.row for trial in trials))
    lines = [f"{study.name}: {study.file.title}", ""]
    width = max(len(key) for row in rows for key in [*changes(study, row), ""])
    for row in rows:
        mark = " (baseline)" if row == study.file.baseline else ""
        title = f": {study.title(row)}" if study.title(row) != row else ""
        lines.append(f"  {row}{title}{mark}")
        lines += [
            f"      {key:{width}}  {show_value(a)} -> {show_value(b)}"
            for key, (a, b) in changes(study, row).items()
        ]
        if not changes(study, row):
            lines.append("      the base as it is")
        parts = study.file.parts_of(row)
        lengths = {part: _length(study.runs[row, part]) for part in parts}
        if len(set(lengths.values())) == 1:
            lines.append(
                f"      length {lengths[parts[0]]}" + (f", each of {', '.join(parts)}" if parts[0] else "")
            )
        else:
            lines += [f"      length {length}, {part}" for part, length in lengths.items()]
    runs = f" x {len(study.file.part_names)} parts" if len(study.file.part_names) > 1 else ""
    seeds = ", ".join(map(str, study.seeds))
    lines += [
        "",
        f"rows x seeds: {len(rows)} x {len(study.seeds)} (seeds {seeds}){runs} = {len(trials)} runs",
    ]
    if study.file.search:
        lines[-1] += f", then {study.file.search.samples} samples of the search"
    steps = [costs.steps(trial.config) for trial in trials]
    if None not in steps:
        images = sum(n * trial.config.train.batch_size for n, trial in zip(steps, trials))
        lines[-1] += f", {sum(steps):,} steps, {images:,} images"
    lines += cost_lines(trials, costs, options)
    lines.append(f"in {study.folder}: {state_text(trials)}")
    return "\n".join(lines)


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
    """How many of the runs are finished, begun and still to be started."""
    finished = sum(trial.finished for trial in trials)
    begun = sum(trial.run_dir.exists() and not trial.finished for trial in trials)
    return f"{finished} finished, {begun} begun, {len(trials) - finished - begun} to start"


def _length(config: Config) -> str:
    return f"{config.train.length} of {config.train.batch_size} images"


def show_value(value: Any) -> str:
    """A setting's value as a person writes it."""
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
