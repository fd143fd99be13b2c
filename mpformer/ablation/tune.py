"""The runs of a study as trials of Ray Tune, each a Ray Train run of its own.

The state of a trial is its run's folder, whose name depends on its settings alone. So Tune's own state is not
needed to resume: a finished run is not a trial any more, an interrupted one resumes at its last checkpoint,
and rows or seeds that were added later are runs that do not exist yet.
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
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would end well at Ctrl-C, after its trials have been told
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
from mpformer.config.figures import AVERAGED, PLAIN, higher_is_better  # noqa: E402
from mpformer.data.catalog import check_root  # noqa: E402
from mpformer.tracking.entry import Entry  # noqa: E402
from mpformer.tracking.run_dir import RunDir  # noqa: E402
from mpformer.tracking.tracker import close_run  # noqa: E402
from mpformer.train import judgement, plugins  # noqa: E402
from mpformer.train.launch import fit, only_driver, start_ray, stop_ray  # noqa: E402
from mpformer.train.start import fetch_weights  # noqa: E402
from mpformer.types import InputError, RunError  # noqa: E402

DRIVER_RESOURCES: dict[str, float] = {"memory": 1}
"""A trial's driver that only waits for its workers claims no CPU: a run that fits alone fits as a trial, too.
Tune requires some resource; this is one byte."""


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result."""

    trial: Trial
    reason: str
    bad_input: bool
    """The reason lies in the settings or the data, not in the run."""


class _Evaluations(TuneReportCallback):
    """Reports a run's evaluations to Tune, except that of the last step: a scheduler would stop the run there
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
    if trial.config.train.stop_early:
        raise InputError("search.stop: asha stops runs itself, so train.stop_early has to be null")
    every, length = trial.config.evaluate.every, trial.config.train.length
    if every is None or "epoch" in every + length:
        raise InputError("search.stop: asha needs evaluate.every and train.length in steps or images")
    batch = trial.config.train.batch_size
    step, total = (duration_in_steps(duration, 0, batch) for duration in (every, length))
    _, metric = split_column(search.column)
    if not metric.startswith((PLAIN, AVERAGED)):
        raise InputError(
            f"search.stop: asha stops a run at its evaluations, and none of them measures {metric}: a column "
            f"{PLAIN}... or {AVERAGED}... is expected"
        )
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=metric,
        mode="max" if higher_is_better(metric) else "min",
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

    `bases`: by part, the settings that a run's MLflow parameters are the difference to. With a `search` that
    stops early, lagging samples are stopped; a file in their folder says so, and they are not resumed.
    Returns the failures; `on_failure` is called for each at once, and the other trials go on. Raises
    `InputError`, with the arithmetic, for a trial that does not fit into the cluster, and before anything
    starts for missing data; `RunError` where another process is at work on one of the runs.
    """
    pending = [trial for trial in trials if not trial.finished]
    if not pending:
        return []
    for data in {trial.config.data.root: trial.config.data for trial in pending}.values():
        check_root(data)
    for trial in pending:
        plugins.check(trial.config)
        judgement.check(trial.config)
        if trial.run_dir.is_dir():
            with only_driver(trial.run_dir):  # raises, before anything starts, for another command at work
                pass
    asha = _asha(search, pending[0]) if search else None
    _require_weights(pending)
    start_ray(trial.config for trial in pending)
    # a trial's failure is reported in one line and not as a traceback
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    capacity = Capacity.of(ray.nodes())
    at_once = trials_at_once(pending, capacity)
    configs = [with_shared_cores(trial.config, capacity, at_once) for trial in pending]
    entries = [Entry(experiment, tracking_parent, bases[trial.part], trial.tags) for trial in pending]

    total_steps = asha.total_steps if asha else None  # the scheduler itself must not go to the trials
    # a scheduler needs the callbacks of a run with workers
    in_process = asha is None and all(capacity.holds_in_one_process(config) for config in configs)

    def drive(settings: dict[str, int]) -> dict[str, Any]:
        callbacks = [] if total_steps is None else [_Evaluations(total_steps)]
        number = settings["trial"]
        try:
            fit(configs[number], entry=entries[number], callbacks=callbacks, in_process=in_process)
        except (InputError, RunError) as error:
            return {"failure": str(error), "bad_input": isinstance(error, InputError)}
        return {}

    def claimed(settings: dict[str, int]) -> tune.PlacementGroupFactory:
        cluster = configs[settings["trial"]].cluster
        claim = capacity.claim_of_worker(cluster) if in_process else DRIVER_RESOURCES
        return tune.PlacementGroupFactory([claim])

    endings = _Endings(pending, on_failure)
    trainable = _in_its_process(drive) if in_process else drive
    tuner = tune.Tuner(
        tune.with_resources(trainable, claimed),
        param_space={"trial": tune.grid_search(list(range(len(pending))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            # a driver that the scheduler stops must not be reused: its run may still be ending
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
            # what `drive` does not catch is the end of its process: a lost machine, or no memory left
            failure_config=tune.FailureConfig(max_failures=_max_failures(pending)),
        ),
    )
    try:
        results = tuner.fit()
    except KeyboardInterrupt:
        if not stop_ray():
            endings.kill_running()
        _tell_killed(pending)
        raise
    if asha:
        _mark_stopped([results[i] for i in range(len(results))], pending)
    return endings.failures


def _require_weights(trials: Sequence[Trial]) -> None:
    """Raise what keeps all trials from having the weights that they start from, before anything starts.

    Where some have theirs, the others fail by themselves.
    """
    errors = []
    for trial in {(t.config.train.init, t.config.model.backbone): t for t in trials}.values():
        try:
            return fetch_weights(trial.config, trial.run_dir)
        except (InputError, RunError) as error:
            errors.append(error)
    raise errors[0]


def _in_its_process(drive: Callable[[dict[str, int]], dict[str, Any]]) -> type[tune.Trainable]:
    """A trial whose process is its run's only worker, and then takes the next trial: nothing is started anew.

    A class, the whole run its one step: in a function Tune's session forbids what workers ask of Ray Train.
    """

    class OneProcessTrial(tune.Trainable):
        failed = False

        def step(self) -> dict[str, Any]:
            result = drive(self.config)
            self.failed = "failure" in result
            return {**result, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return not self.failed  # what has failed, for want of memory perhaps, is left with its process

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # the run's folder is its state

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            pass

    return OneProcessTrial


def _tell_killed(trials: Sequence[Trial]) -> None:
    """Tell the trackers of trials whose processes have ended. They go on from their checkpoints."""
    for trial in trials:
        if not trial.finished:
            close_run(trial.run_dir, "KILLED", only_running=True)


def _mark_stopped(results: Sequence[tune.Result], trials: Sequence[Trial]) -> None:
    """Write into the folder of each trial that the scheduler has stopped at which step that was."""
    by_folder = {trial.run_dir.name: trial for trial in trials}
    for result in results:
        trial, metrics = by_folder[Path(result.path).name], result.metrics or {}
        if result.error is None and not trial.finished and "failure" not in metrics:
            mark = json.dumps({"by": "asha", "step": metrics["step"]})
            RunDir(trial.run_dir).stopped.write_text(mark)
            close_run(trial.run_dir, "KILLED")


def _max_failures(trials: Sequence[Trial]) -> int:
    """The most of any trial; -1 (no limit) where one has that."""
    each = [trial.config.cluster.max_failures for trial in trials]
    return -1 if -1 in each else max(each)


class _Endings(TrialProgressCallback):
    """Collects failures as they happen, in place of Tune's own callback that prints completed trials."""

    def __init__(self, trials: Sequence[Trial], on_failure: Callable[[Failure], None]) -> None:
        super().__init__()
        self.failures: list[Failure] = []
        self._running: dict[str, Any] = {}
        """Tune's trials that have a process, by id."""
        self._trials = trials
        self._on_failure = on_failure

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running[trial.trial_id] = trial

    def kill_running(self) -> None:
        """End the processes of trials at once, and with them the workers, whose owners they are."""
        for trial in self._running.values():
            if (process := trial.temporary_state.ray_actor) is not None:
                ray.kill(process)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Also where `drive` has returned a failure."""
        result = trial.last_result
        if "failure" in result:
            self._add(trial, result["failure"], result["bad_input"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process ended and has no restarts left; no tracker was told."""
        close_run(self._trials[trial.config["trial"]].run_dir, "FAILED", only_running=True)
        self._add(trial, _reason(trial.get_pickled_error() or trial.get_error()), bad_input=False)

    def log_result(self, *args: Any, **info: Any) -> None:
        """Prints nothing."""

    def _add(self, trial: Any, reason: str, bad_input: bool) -> None:
        self.failures.append(Failure(self._trials[trial.config["trial"]], reason, bad_input))
        self._on_failure(self.failures[-1])


def _reason(error: BaseException) -> str:
    """The cause of a trial's end, in one line.

    Ray gives a traceback as text, with the cause as its last exception, or the message of an exception of its
    own, with the cause in the first line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit): ", line)]
    return (named[-1] if named else lines[0]).strip()
