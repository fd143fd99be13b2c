"""The runs of a study as trials of Ray Tune, each a Ray Train run of its own.

What a trial has done lies in its run's folder, and a run's name depends on its settings alone. So nothing of
Tune's own state is needed to go on: a finished run is not a trial any more, an interrupted one resumes at
its last checkpoint, and rows or seeds that were added later are simply runs that do not exist yet.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray is imported: the runs keep records of their own, and relative paths mean the same in a trial.
for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # as in train/launch, which comes too late for this one here
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.integration.ray_train import TuneReportCallback  # noqa: E402
from ray.tune.progress_reporter import TrialProgressCallback  # noqa: E402
from ray.tune.schedulers import ASHAScheduler  # noqa: E402

from mpformer.ablation.plan import trials_at_once  # noqa: E402
from mpformer.ablation.spec import Trial  # noqa: E402
from mpformer.ablation.studyfile import Search, split_column  # noqa: E402
from mpformer.capacity import Capacity, with_shared_cores  # noqa: E402
from mpformer.config import Config, duration_in_steps  # noqa: E402
from mpformer.data.catalog import check_root  # noqa: E402
from mpformer.tracking.run_dir import RunDir  # noqa: E402
from mpformer.tracking.tracker import Entry, close_run  # noqa: E402
from mpformer.train import plugins  # noqa: E402
from mpformer.train.launch import fit, only_driver, start_ray  # noqa: E402
from mpformer.types import InputError, RunError  # noqa: E402

DRIVER_RESOURCES = {"memory": 1}
"""A trial's driver only waits, so it claims no CPU: a run that fits alone fits as a trial, too. Tune requires
some resource; this is one byte."""


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result."""

    trial: Trial
    reason: str
    bad_input: bool
    """The reason lies in the settings or the data, not in the run."""


class _Evaluations(TuneReportCallback):
    """Tells Tune of a run's evaluations, but for that of the last step: a scheduler would stop the run there
    before it has written its summary."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.total_steps = total_steps

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["step"] < self.total_steps:
            super().after_report(run_context, metrics, checkpoint)


@dataclass(frozen=True)
class _Asha:
    scheduler: ASHAScheduler
    total_steps: int


def _asha(search: Search, trial: Trial) -> _Asha | None:
    """Tune's asynchronous successive halving over the evaluations that a run reports."""
    if search.stop == "none":
        return None
    if trial.config.cluster.evaluators:
        raise InputError("search.stop: asha stops a run at its evaluations, so it needs cluster.evaluators=0")
    every, length = trial.config.evaluate.every, trial.config.train.length
    if every is None or "epoch" in every + length:
        raise InputError("search.stop: asha needs evaluate.every and train.length in steps or images")
    batch = trial.config.train.batch_size
    step, total = (duration_in_steps(duration, 0, batch) for duration in (every, length))
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=split_column(search.column)[1],
        mode="max",
        grace_period=step * search.grace,
        max_t=total,
        reduction_factor=search.reduction,
    )
    return _Asha(scheduler, total)


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    experiment: str,
    tracking_parent: str | None,
    bases: Mapping[str, Config],
    search: Search | None = None,
    on_failure: Callable[[Failure], None] = lambda failure: None,
) -> list[Failure]:
    """Run or resume every trial that is not finished, as many at once as the cluster holds.

    `bases`: by part, the settings that MLflow's parameters of a run are told against. The samples of a
    `search` that lag behind are given up, if it says so; their folder notes it, and they are not taken up
    again. Returns the failures; `on_failure` is told of each at once, and the other trials go on. Raises
    `InputError`, with the arithmetic, where not even one trial fits into the cluster, and at once where the
    data are not there; `RunError` where another process is at work on one of the runs.
    """
    pending = [trial for trial in trials if not trial.finished]
    if not pending:
        return []
    for data in {trial.config.data.root: trial.config.data for trial in pending}.values():
        check_root(data)
    for trial in pending:
        plugins.check(trial.config)
        if trial.run_dir.is_dir():
            with only_driver(trial.run_dir):  # another command on the same study: told before anything starts
                pass
    start_ray(trial.config for trial in pending)
    # a trial's failure is told in one line and not as a traceback
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    capacity = Capacity.of(ray.nodes())
    at_once = trials_at_once(pending, capacity)
    configs = [with_shared_cores(trial.config, capacity, at_once) for trial in pending]
    entries = [Entry(experiment, tracking_parent, bases[trial.part], trial.tags) for trial in pending]

    asha = _asha(search, pending[0]) if search else None
    told_until = asha.total_steps if asha else None

    def drive(settings: dict[str, int]) -> dict[str, Any]:
        callbacks = [] if told_until is None else [_Evaluations(told_until)]
        number = settings["trial"]
        try:
            fit(configs[number], entry=entries[number], callbacks=callbacks)
        except (InputError, RunError) as error:
            return {"failure": str(error), "bad_input": isinstance(error, InputError)}
        return {}

    endings = _Endings(pending, on_failure)
    tuner = tune.Tuner(
        tune.with_resources(drive, DRIVER_RESOURCES),
        param_space={"trial": tune.grid_search(list(range(len(pending))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            # a driver that is stopped from outside must not be used again: its run may still be ending
            reuse_actors=asha is None,
            scheduler=asha.scheduler if asha else None,
            trial_name_creator=lambda trial: pending[trial.config["trial"]].label,
            trial_dirname_creator=lambda trial: pending[trial.config["trial"]].run_dir.name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[endings],
            # what `drive` does not catch is the end of its process: with its machine, or for want of memory
            failure_config=tune.FailureConfig(max_failures=_max_failures(pending)),
        ),
    )
    results = tuner.fit()
    if asha:
        by_folder = {trial.run_dir.name: trial for trial in pending}
        for result in results:
            trial = by_folder[Path(result.path).name]
            if result.error is None and not trial.finished and "failure" not in result.metrics:
                step = result.metrics["step"]
                RunDir(trial.run_dir).stopped.write_text(json.dumps({"by": "asha", "step": step}))
                close_run(trial.run_dir, "KILLED")
    return endings.failures


def _max_failures(trials: Sequence[Trial]) -> int:
    """Of any trial; -1 (without limit) where one asks for it."""
    each = [trial.config.cluster.max_failures for trial in trials]
    return -1 if -1 in each else max(each)


class _Endings(TrialProgressCallback):
    """Collects failures as they happen; in the place of the callback with which Tune says that a trial is
    complete: `progress` says more."""

    def __init__(self, trials: Sequence[Trial], on_failure: Callable[[Failure], None]) -> None:
        super().__init__()
        self.failures: list[Failure] = []
        self._trials = trials
        self._on_failure = on_failure

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Also where `drive` has returned a failure."""
        result = trial.last_result
        if "failure" in result:
            self._add(trial, result["failure"], result["bad_input"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process ended, and may not be started again."""
        self._add(trial, _reason(trial.get_pickled_error() or trial.get_error()), bad_input=False)

    def log_result(self, *args: Any, **info: Any) -> None:
        """Prints nothing."""

    def _add(self, trial: Any, reason: str, bad_input: bool) -> None:
        self.failures.append(Failure(self._trials[trial.config["trial"]], reason, bad_input))
        self._on_failure(self.failures[-1])


def _reason(error: BaseException) -> str:
    """What ended a trial, in one line.

    Ray gives a traceback as text, whose last exception it is, or the words of an exception of its own, which
    says it in its first line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit): ", line)]
    return (named[-1] if named else lines[0]).strip()
