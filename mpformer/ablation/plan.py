"""What a study is going to do, before anything of it is started. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpformer.ablation.cost import Costs, PlanOptions, cost_lines
from mpformer.ablation.spec import Study, Trial
from mpformer.config import Config, diff
from mpformer.train.capacity import FEW_CORES_DATA_CPUS, Capacity, uses_gpus
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


# --- what fits ------------------------------------------------------------------------------------


DRIVER_CPUS = 0.01
"""A trial's driver only waits; Tune refuses zero, and its default of 1 would starve the workers."""


def trials_at_once(trials: Sequence[Trial], capacity: Capacity) -> int:
    """How many trials of a study fit into the cluster together, at least 1 and at most all.

    A trial claims `cluster.cpus_per_worker` CPUs for each of its workers and evaluators, and a GPU each where
    it trains on GPUs; on CPUs each has a core of its own. What is left must hold a task of Ray Data, which
    would else wait for ever: one CPU, or a tenth per worker on a machine of few cores. Raises `InputError`,
    with the arithmetic, where not even one trial fits.
    """
    return min(len(trials), *(_fitting(trial, capacity) for trial in trials))


def _fitting(trial: Trial, capacity: Capacity) -> int:
    cluster = trial.config.cluster
    members = cluster.workers + cluster.evaluators
    claim = members * cluster.cpus_per_worker + DRIVER_CPUS
    if capacity.cpus >= 4 * cluster.workers:
        by_cpus = int((capacity.cpus - 1) / claim + 1e-9)
    else:
        by_cpus = int(capacity.cpus / (claim + FEW_CORES_DATA_CPUS * cluster.workers) + 1e-9)
    fitting = min(by_cpus, capacity.members(trial.config) // members)
    what = "GPU"
    if not uses_gpus(trial.config, capacity):
        fitting, what = min(fitting, int(capacity.cpus) // members), "core"
    if fitting < 1:
        who = f"{cluster.workers} workers"
        if cluster.evaluators:
            who = f"({who} + {cluster.evaluators} evaluators)"
        raise InputError(
            f"row {trial.row} cannot run here: {who} x {cluster.cpus_per_worker:g} CPU + "
            f"{DRIVER_CPUS} for their driver = {claim:g} CPUs, some more for data on one machine, and a "
            f"{what} per worker = {members}; the cluster has {capacity}: "
            "lower cluster.workers or cluster.cpus_per_worker"
        )
    return fitting
