"""The runs of a study as trials of Ray Tune, each a Ray Train run of its own.

What a trial has done lies in its run's folder, and a run's name depends on its settings alone. So nothing of
Tune's own state is needed to go on: a finished run is not a trial any more, an interrupted one resumes at
its last checkpoint, and rows or seeds that were added later are simply runs that do not exist yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray is imported: the runs keep records of their own, and relative paths mean the same in a trial.
for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402

from mpformer.ablation.plan import DRIVER_CPUS, Capacity, threads_per_worker, trials_at_once  # noqa: E402
from mpformer.ablation.spec import Trial  # noqa: E402
from mpformer.train.launch import fit, start_ray  # noqa: E402
from mpformer.types import InputError, RunError  # noqa: E402


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result."""

    trial: Trial
    reason: str
    bad_input: bool
    """The reason lies in the settings or the data, not in the run."""


def run_trials(
    trials: Sequence[Trial], folder: Path, experiment: str, tracking_parent: str | None
) -> list[Failure]:
    """Run or resume every trial that is not finished, as many at once as the cluster holds.

    Returns the failures; the other trials go on. Raises `InputError`, with the arithmetic, where not even one
    trial fits into the cluster.
    """
    pending = [trial for trial in trials if not trial.finished]
    if not pending:
        return []
    start_ray()
    have = ray.cluster_resources()
    capacity = Capacity(have.get("CPU", 0.0), have.get("GPU", 0.0))
    at_once = trials_at_once(trials, capacity)
    configs = [threads_per_worker(trial.config, capacity, at_once) for trial in pending]

    def drive(settings: dict[str, int]) -> dict[str, Any]:
        try:
            fit(configs[settings["trial"]], experiment=experiment, tracking_parent=tracking_parent)
        except (InputError, RunError) as error:
            return {"failure": str(error), "bad_input": isinstance(error, InputError)}
        return {}

    tuner = tune.Tuner(
        tune.with_resources(drive, {"CPU": DRIVER_CPUS}),
        param_space={"trial": tune.grid_search(list(range(len(pending))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: pending[trial.config["trial"]].label,
            trial_dirname_creator=lambda trial: pending[trial.config["trial"]].run_dir.name,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder.resolve()), verbose=0),
    )
    failures = []
    for result in tuner.fit():
        trial = pending[result.config["trial"]]
        if result.error is not None:
            failures.append(Failure(trial, _last_line(result.error), bad_input=False))
        elif "failure" in result.metrics:
            failures.append(Failure(trial, result.metrics["failure"], result.metrics["bad_input"]))
    return failures


def _last_line(error: BaseException) -> str:
    """Ray wraps a worker's traceback into the message: its last line is the exception itself."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
