"""Start or resume one run as a Ray Train `TorchTrainer`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.capacity import Capacity
from mpformer.config import Config, dump_yaml, run_name
from mpformer.cores import usable_cores
from mpformer.data.catalog import check_same_classes
from mpformer.data.obstacles import notes_of, require_usable
from mpformer.data.version import SPLITS, DataVersion
from mpformer.model.weights.checkpoints import complete, latest
from mpformer.model.weights.named import is_remote
from mpformer.plugin import inherited_folder
from mpformer.tracking.entry import Entry
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.mlflow_store import prepare_store
from mpformer.tracking.record import read_summary
from mpformer.tracking.run_dir import RunDir
from mpformer.tracking.tracker import close_run
from mpformer.train import extension, judgement, plugins, rundata
from mpformer.train.mirror import open_mirror
from mpformer.train.start import fetch_weights
from mpformer.types import InputError, RunError

# Before ray is imported anywhere in this process; its workers inherit them.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # every run is several actors that claim no CPU: so many processes are no sign of trouble here
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
    # idle OpenMP threads that spin take the cores from data tasks and from other trials
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchTrainer  # noqa: E402

from mpformer.train.job import Job  # noqa: E402
from mpformer.train.worker import run_worker  # noqa: E402

log = logging.getLogger(__name__)

SECONDS_OF_AN_ORPHAN = 20.0
SECONDS_TO_A_CLUSTER = 20.0
SECONDS_TO_ABORT = 10.0


def start_ray(configs: Iterable[Config] = ()) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; nothing if there is one already.

    `configs`: the runs that need it, whose plug-ins can then be imported on every worker. A machine with one
    core still gets two logical CPUs: Ray Data waits for ever where training workers leave it none. Raises
    `RunError` where no cluster answers, or none starts in time.
    """
    global _own_session
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        _init_ray(address, plugins.runtime_env(configs))
        _own_session = _session()
    except Exception as error:  # Ray raises exceptions of no class of its own here
        where = (
            f"no cluster answers at RAY_ADDRESS={address}"
            if address
            else "no local cluster started (on a busy machine, try again)"
        )
        raise RunError(f"Ray: {where}: {_first_line(error)}") from error


_own_session: tuple[str, str] | None = None
"""That of this process's connection to Ray which `start_ray` has made."""


def _session() -> tuple[str, str]:
    """What tells a connection of this process to a cluster from earlier ones."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def stop_ray() -> bool:
    """End the Ray that `start_ray` has started or joined, with all that it does for this process, at once.

    False, and nothing done, where the caller has started Ray himself: it is not ours to end.
    """
    if not ray.is_initialized() or _session() != _own_session:
        return False
    ray.shutdown()
    return True


def _init_ray(address: str | None, runtime_env: dict[str, Any]) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        host, colon, port = address.rpartition(":")
        if colon and port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host.rpartition("/")[2], int(port)), SECONDS_TO_A_CLUSTER).close()
        ray.init(runtime_env=runtime_env or None, **quiet)
    else:
        # nobody takes this machine away with a warning: one process less to start for every run
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # a cluster that happens to run on this machine is joined only when RAY_ADDRESS says so
        cpus = max(2, usable_cores())  # a worker, and what prepares its data
        with inherited_folder():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)


def run_directory(config: Config) -> Path:
    """The run's folder: a function of storage, name, settings and seed alone."""
    return Path(config.storage).resolve() / run_name(config)


def fit(
    config: Config,
    *,
    entry: Entry | None = None,
    callbacks: Sequence[Any] = (),
    in_process: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train one run to its end and return its summary; the same settings again resume or just return it.

    `entry`: where it stands in MLflow, by default in an experiment of the recipe's name; `callbacks` for Ray
    Train's RunConfig. `in_process`: this process is the run's only worker and holds what that claims (Ray
    Train's local mode: no process to start, no callbacks, no restarts). `tell` is called with a line before
    each part of the start that takes seconds. Raises `InputError` for bad settings or data, and for other
    data than the run was begun on (`rundata.ChangedDataError`), `RunError` where the run fails or another
    process is at work on it.
    """
    run_dir = run_directory(config)
    mirror = open_mirror(config, run_dir)
    mirror.pull()
    version = DataVersion(config.data)
    if (summary := read_summary(run_dir)) is not None:
        mirror.finish()
        if (line := rundata.check(run_dir, version)) is not None:
            log.warning("%s: %s", run_dir.name, line)
        return summary
    plugins.check(config)
    is_remote(config.train.init or "")  # a wrong address is told before it is written anywhere
    judgement.check(config)
    fetch_weights(config, run_dir)
    if complete(run_dir):
        rundata.check(run_dir, version)  # before it is told what is wrong with other data
    tell(f"reading the annotations in {config.data.root}")
    splits = {name: version.open(name) for name in SPLITS}
    if not splits["train"].records:
        raise InputError(f"{config.data.root}: the training split has no image")
    # labels are places in the table: with another one the figures would compare the wrong classes
    check_same_classes(splits["train"].classes, splits["val"].classes, splits["val"].name)
    for line in notes_of(splits):
        log.warning("%s", line)
    require_usable(config.data, splits)
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_driver(run_dir):
        begun, damaged = latest(run_dir)
        for line in damaged:
            log.warning("%s. The run goes on from the checkpoint before", line)
        extended = begun is None and config.train.resume_from is not None
        if extended:
            begun = extension.begin(run_dir, config, splits["train"])
        parent = read_parent(run_dir) if config.train.resume_from is not None else None
        data_tags = rundata.settle(run_dir, version, begun)
        atomic.write_text(RunDir(run_dir).config, dump_yaml(config))
        if extended:
            mirror.push()  # a worker on another machine finds the checkpoint there
        # a run that has begun does without them: they may be gone
        init = None if begun or config.train.init is None else _start_weights(config.train.init, tell)
        tell(
            f"{len(splits['train'])} training and {len(splits['val'])} validation images; starting Ray, "
            "which takes some seconds"
        )
        start_ray([config])
        capacity = Capacity.of(ray.nodes())
        scaling = ScalingConfig(num_workers=0) if in_process else _scaling(config, capacity)
        entry = entry or Entry(config.name)
        job = Job(
            config,
            run_dir,
            ray.put(splits["train"]),
            ray.put(splits["val"]),
            uuid.uuid4().hex,
            replace(entry, tags={**entry.tags, **data_tags, **(parent.tags() if parent else {})}),
            prepare_store(config, entry.experiment, len(capacity.nodes)),
            init,
            begun.step if begun else None,
            capacity.uses_gpus(config.cluster),
        )
        trainer = _Trainer(
            run_worker,
            train_loop_config={"job": job},
            scaling_config=scaling,
            run_config=RunConfig(
                name="ray",
                storage_path=str(run_dir),
                callbacks=list(callbacks),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        workers = config.cluster.workers
        tell(f"starting {workers} training worker{'s' if workers > 1 else ''}")
        try:
            trainer.fit()
        except KeyboardInterrupt:
            # the workers end at once, before the trackers are told
            if not stop_ray():
                trainer.end_workers()
            close_run(run_dir, "KILLED", only_running=True)
            raise
        except ray.train.TrainingFailedError as error:
            close_run(run_dir, "FAILED")
            _raise_noted_failure(run_dir, job.token)
            raise RunError(f"{run_dir.name}: {_reason(error)}") from error
        _raise_noted_failure(run_dir, job.token)
        mirror.pull()
        summary = read_summary(run_dir)
    if summary is None:
        raise RunError(f"{run_dir}: the workers ended without a summary")
    return summary


class _Trainer(TorchTrainer):
    """Ends with `KeyboardInterrupt` at Ctrl-C, where Ray's own handler ends the process, with exit code 0."""

    _controller: ray.actor.ActorHandle | None = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Python's handler in its place."""
        self._controller = controller

    def end_workers(self) -> None:
        """End the controller and its workers, and wait for that, where Ray itself goes on."""
        if self._controller is None:
            return
        # the controller ends its workers and then itself, which is an error of the call
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(self._controller.abort.remote(), timeout=SECONDS_TO_ABORT)
        ray.kill(self._controller)  # its workers then end by themselves, for want of their owner


def _start_weights(source: str, tell: Callable[[str], None] = lambda line: None) -> Path | str:
    """What the workers load of `train.init`: a file, or the name of weights that each machine fetches.

    They are fetched here first, so that what is wrong with them is told before workers start.
    """
    from mpformer.model.weights.loading import chosen_weights  # it loads what builds models

    chosen = chosen_weights(source)
    if chosen.note:
        tell(f"train.init: {chosen.note}")
    return source if is_remote(source) else chosen.file.resolve()


def _scaling(config: Config, capacity: Capacity) -> ScalingConfig:
    """Raises `InputError`, with the arithmetic, where the run does not fit into the cluster."""
    capacity.check_fits(config)
    cluster, least = config.cluster, config.cluster.least_workers
    workers: Any = cluster.workers if least == cluster.workers else (least, cluster.workers)
    return ScalingConfig(
        num_workers=workers,  # Ray's annotation lacks the elastic pair
        use_gpu=capacity.uses_gpus(cluster),
        resources_per_worker=capacity.claim_of_worker(cluster),
    )


@contextlib.contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock; the system frees it when the process ends, however it ends.

    The trial of a study whose driver was killed outlives it by some seconds: so long its successor waits.
    """
    deadline = time.monotonic() + SECONDS_OF_AN_ORPHAN
    with RunDir(run_dir).lock.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"{run_dir}: another process is at work on this run") from None
                time.sleep(0.2)
        yield


def _raise_noted_failure(run_dir: Path, token: str) -> None:
    note = RunDir(run_dir).failure
    if not note.exists():
        return
    failure = json.loads(note.read_text())
    if failure["token"] == token:
        raise (InputError if failure["kind"] == "InputError" else RunError)(failure["message"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """The innermost cause in one line."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = str(causes[0]).strip().splitlines()
    return lines[-1] if lines else type(causes[0]).__name__
