"""What a study is going to do, before anything of it is started. Imports neither torch nor ray."""

from __future__ import annotations

from typing import Any

from mpformer.ablation.spec import Study, Trial
from mpformer.config import Config, diff, duration_in_steps


def plan_text(study: Study, only: str | None = None) -> str:
    """Rows x seeds, what each row changes against the common base, the runs, their steps and their state.

    Raises `InputError` where there is no row `only`.
    """
    trials = study.trials(only)
    rows = list(dict.fromkeys(trial.row for trial in trials))
    lines = [f"{study.name}: {study.file.title}", ""]
    width = max(len(key) for row in rows for key in [*changes(study, row), ""])
    for row in rows:
        mark = " (baseline)" if row == study.file.baseline else ""
        title = f": {study.title(row)}" if study.title(row) != row else ""
        lines.append(f"  {row}{title}{mark}")
        lines += [
            f"      {key:{width}}  {_show(a)} -> {_show(b)}" for key, (a, b) in changes(study, row).items()
        ]
        if not changes(study, row):
            lines.append("      the base as it is")
        lines.append(f"      length {_length(study.rows[row])}")
    seeds = ", ".join(map(str, study.seeds))
    lines += ["", f"{len(rows)} rows x {len(study.seeds)} seeds ({seeds}) = {len(trials)} runs"]
    steps = [_steps(trial.config) for trial in trials]
    if None not in steps:
        images = sum(n * trial.config.train.batch_size for n, trial in zip(steps, trials))
        lines[-1] += f", {sum(steps):,} steps, {images:,} images"
    lines.append(f"in {study.folder}: {state_text(trials)}")
    return "\n".join(lines)


def changes(study: Study, row: str) -> dict[str, tuple[Any, Any]]:
    """Settings in which a row differs from the common base: {dotted key: (base, row)}."""
    return diff(study.base, study.rows[row])


def state_text(trials: list[Trial]) -> str:
    """How many of the runs are finished, begun and still to be started."""
    finished = sum(trial.finished for trial in trials)
    begun = sum(trial.run_dir.exists() and not trial.finished for trial in trials)
    return f"{finished} finished, {begun} begun, {len(trials) - finished - begun} to start"


def _steps(config: Config) -> int | None:
    """Optimiser steps of a run; None where its length is in epochs: no data set is looked at here."""
    if "epoch" in config.train.length:
        return None
    return duration_in_steps(config.train.length, 0, config.train.batch_size)


def _length(config: Config) -> str:
    return (
        f"{config.train.length} of {config.train.batch_size} images"
        if _steps(config)
        else config.train.length
    )


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_show, value)) + "]"
    return "null" if value is None else str(value)
