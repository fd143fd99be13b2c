"""Tracking of a run: its record (`mpformer.record`) always, MLflow as the record's mirror.

Points go to MLflow when the checkpoint that covers them is committed, each key in the order of its steps. So
what MLflow has of a key is always a beginning of the record, and MLflow's own latest step of that key says
where to go on: after a kill at any moment no point is double and none is missing. A store that cannot be
reached never stops a run: the reason is noted in `RUN/mlflow.json`, and `sync` brings what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpformer.commit import git_commit
from mpformer.config import Config, config_hash, diff
from mpformer.record import Part, Point, merge_steps, parts, read_metrics, read_points
from mpformer.types import InputError, RunError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = [
    "Link",
    "Tracker",
    "attach",
    "close_run",
    "git_commit",
    "open_parent",
    "prepare_store",
    "read_metrics",
    "sync",
]

log = logging.getLogger(__name__)

# Before mlflow is imported anywhere: give up on a dead server within seconds, not minutes, and be quiet.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_VALUE = 500
"""MLflow's limits for one `log_batch` and for a parameter's value."""

LONGEST_SHARE_WAITING = 0.02
"""After a failed attempt the store is left alone so long that a dead one takes no more of the time."""


# --- the tracker ----------------------------------------------------------------------------------


class Tracker:
    """Writes the record of one run and mirrors it to MLflow. One process only: rank 0."""

    def __init__(self, part: Part, mirror: _Mirror | None, start_step: int) -> None:
        self._part = part
        self._mirror = mirror
        self._last_step = start_step

    @classmethod
    def open(
        cls,
        run_dir: Path,
        config: Config,
        *,
        start_step: int,
        parent_run_id: str | None,
        mlflow_uri: str | None,
        experiment: str,
        run_name: str,
    ) -> Tracker:
        """Open the record for a run that begins, or goes on, at `start_step`.

        `mlflow_uri` comes from `prepare_store`; None mirrors nothing. A run that was mirrored before goes on
        in the same MLflow run. Raises `RunError` where the record cannot be written; MLflow's failures raise
        nothing.
        """
        run_dir = Path(run_dir)
        part = Part(run_dir, start_step)
        if mlflow_uri is None:
            return cls(part, None, start_step)
        known = Link.read(run_dir)
        link = Link(
            uri=mlflow_uri,
            experiment=experiment,
            run_name=run_name,
            parent_run_id=parent_run_id,
            tags=_tags(config, study=experiment if parent_run_id else None),
            params={key: str(value)[:LONGEST_VALUE] for key, (value, _) in diff(config, Config()).items()},
            run_id=known.run_id if known else None,
            committed_step=start_step,
        )
        mirror = _Mirror(run_dir, link)
        mirror.attempt()
        return cls(part, mirror, start_step)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._mirror.link.run_id if self._mirror else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point at once: `values` by metric key, measured after `step` optimiser steps."""
        point = self._part.add(step, values)
        self._last_step = max(self._last_step, step)
        if self._mirror:
            self._mirror.add(point)

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is safe: what was measured up to it goes to MLflow."""
        self._part.sync()
        if self._mirror:
            self._mirror.advance(committed_step=step)
            self._mirror.attempt()

    def finish(self, status: str = "FINISHED") -> None:
        """Close the record. `status`: FINISHED, which sends all that is left, or FAILED or KILLED, which do
        not: a resumed run measures again what no checkpoint covers."""
        self._part.sync()
        self._part.close()
        if self._mirror:
            last = self._last_step if status == "FINISHED" else self._mirror.link.committed_step
            self._mirror.advance(committed_step=last, status=status)
            self._mirror.attempt(at_once=True)


# --- the mirror -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """`RUN/mlflow.json`: which MLflow run mirrors this run, and how far it may go."""

    uri: str
    experiment: str
    run_name: str
    parent_run_id: str | None
    tags: dict[str, str]
    params: dict[str, str]
    run_id: str | None = None
    committed_step: int = 0
    """Points up to this step are covered by a checkpoint (or the run has ended): they may be mirrored."""
    status: str = "RUNNING"
    problem: str | None = None
    """Why the last attempt to reach the store failed."""

    @staticmethod
    def path(run_dir: Path) -> Path:
        return Path(run_dir) / "mlflow.json"

    @classmethod
    def read(cls, run_dir: Path) -> Link | None:
        path = cls.path(run_dir)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, run_dir: Path) -> None:
        path = self.path(run_dir)
        fresh = path.with_suffix(".json.new")
        try:
            fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error


class _Mirror:
    """Sends points of one run to MLflow; a failure is noted and tried again later."""

    def __init__(self, run_dir: Path, link: Link) -> None:
        self.run_dir = run_dir
        self.link = link
        self._client: MlflowClient | None = None
        self._sent_until: dict[str, int] | None = None
        """Latest step of each key in MLflow; None until MLflow was asked, and again after a failure."""
        self._pending: list[Point] = []
        """Points that MLflow may not have yet; filled from the record whenever MLflow is asked."""
        self._not_before = 0.0
        link.write(run_dir)

    def add(self, point: Point) -> None:
        """A point that was just recorded."""
        if self._sent_until is not None:
            self._pending.append(point)

    def advance(self, **changes: Any) -> None:
        self.link = replace(self.link, **changes)
        self.link.write(self.run_dir)

    def attempt(self, at_once: bool = False) -> bool:
        """Bring MLflow up to the committed step; False, with the reason noted, where that fails."""
        if not at_once and time.monotonic() < self._not_before:
            return False
        began = time.monotonic()
        failures = mlflow_failures()
        try:
            self._connect()
            self._send()
            if self.link.status != "RUNNING":
                self._send_pictures()
                self._client.set_terminated(self.link.run_id, self.link.status)
        except failures as error:
            reason = first_line(error)
            if self.link.problem is None:
                log.warning(
                    "MLflow %s: %s. The run goes on; later: mpformer sync %s",
                    self.link.uri,
                    reason,
                    self.run_dir,
                )
            self._sent_until = None  # part of a batch may have arrived: ask MLflow next time
            now = time.monotonic()
            self._not_before = now + (now - began) / LONGEST_SHARE_WAITING
            self.advance(problem=reason)
            return False
        if self.link.problem is not None:
            self.advance(problem=None)
        return True

    def _connect(self) -> None:
        if self._sent_until is not None:
            return
        if self._client is None:
            self._client = client(self.link.uri)
        run = _find_run(self._client, self.link.run_id)
        if run is None:
            self._create()
            sent_until = {}
        else:
            if self.link.status == "RUNNING" and run.info.status != "RUNNING":
                self._client.update_run(self.link.run_id, status="RUNNING")
            sent_until = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._pending = read_points(self.run_dir)
        self._sent_until = sent_until

    def _create(self) -> None:
        from mlflow.entities import Param

        tags = dict(self.link.tags)
        if self.link.parent_run_id:
            tags["mlflow.parentRunId"] = self.link.parent_run_id
            experiment = self._client.get_run(self.link.parent_run_id).info.experiment_id
        else:
            experiment = experiment_id(self._client, self.link.experiment)
        run = self._client.create_run(experiment, tags=tags, run_name=self.link.run_name)
        self.advance(run_id=run.info.run_id)
        params = [Param(key, value) for key, value in self.link.params.items()]
        for i in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run.info.run_id, params=params[i : i + PARAMS_PER_CALL])

    def _send(self) -> None:
        from mlflow.entities import Metric

        due = merge_steps(point for point in self._pending if point.step <= self.link.committed_step)
        metrics = [
            Metric(key, value, point.time, point.step)
            for point in due
            for key, value in point.values.items()
            if point.step > self._sent_until.get(key, -1)
        ]
        for i in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.link.run_id, metrics=metrics[i : i + METRICS_PER_CALL])
        self._sent_until.update({metric.key: metric.step for metric in metrics})
        self._pending = [point for point in self._pending if point.step > self.link.committed_step]

    def _send_pictures(self) -> None:
        """The pictures and pages of the run's evaluations, as they lie in its folder."""
        pictures = self.run_dir / "pictures"
        if pictures.is_dir():
            self._client.log_artifacts(self.link.run_id, str(pictures), "pictures")


def attach(run_dir: Path, step: int, values: Mapping[str, float], folder: Path) -> str | None:
    """Bring to MLflow what was found out about a checkpoint of a mirrored run after its training.

    `folder`, below `RUN/pictures`, becomes an artefact; of the figures `values`, measured after `step`
    optimiser steps, those that the run's own record does not have become metrics. One line that says where,
    or why not; None for a run that is not mirrored. Raises nothing.
    """
    link = Link.read(run_dir)
    if link is None or link.run_id is None:
        return None
    from mlflow.entities import Metric

    recorded = {key for _, point in read_metrics(run_dir) for key in point}
    now = time.time_ns() // 1_000_000
    metrics = [Metric(key, value, now, step) for key, value in values.items() if key not in recorded]
    failures = mlflow_failures()
    try:
        store = client(link.uri)
        store.log_artifacts(link.run_id, str(folder), f"pictures/{folder.name}")
        store.log_batch(link.run_id, metrics=metrics)
    except failures as error:
        return f"MLflow {link.uri}: {first_line(error)}: it does not have {folder}"
    return f"MLflow run {link.run_id} at {link.uri} has it, too"


def attach_report(folder: Path, files: Iterable[Path]) -> str | None:
    """Bring a study's report to its parent run as artefacts; why not, where that fails, else None."""
    if not (path := Path(folder) / "mlflow.json").exists():
        return None
    parent = json.loads(path.read_text(encoding="utf-8"))
    try:
        store = client(parent["uri"])
        for file in files:
            store.log_artifact(parent["run_id"], str(file), "report")
    except mlflow_failures() as error:
        return f"MLflow {parent['uri']}: {first_line(error)}: it does not have the report"
    return None


def sync(run_dir: Path) -> str:
    """Bring to MLflow what it lacks of a run's record; one line that says what it has now.

    Points that no checkpoint covers stay out unless the run has finished: a resumed run measures them again.
    Raises `InputError` where the folder is no tracked run, `RunError` where the store still fails.
    """
    run_dir = Path(run_dir)
    if not parts(run_dir):
        raise InputError(
            f"{run_dir}: no metrics record here; a run's folder is expected, for instance runs/NAME"
        )
    link = Link.read(run_dir)
    if link is None:
        raise InputError(f"{run_dir}: this run was not tracked with MLflow (tracking.mlflow: null)")
    if (run_dir / "summary.json").exists():  # killed between its last line and its good-bye to MLflow
        link = replace(link, status="FINISHED")
    mirror = _Mirror(run_dir, link)
    if not mirror.attempt(at_once=True):
        raise RunError(f"MLflow {link.uri}: {mirror.link.problem}")
    return f"MLflow run {mirror.link.run_id} at {link.uri} has the record up to step {link.committed_step}"


def close_run(run_dir: Path, status: str) -> None:
    """Tell MLflow how a run has ended whose own process cannot say it any more: FAILED or KILLED."""
    link = Link.read(run_dir)
    if link is not None:
        _Mirror(run_dir, replace(link, status=status)).attempt(at_once=True)


# --- the store ------------------------------------------------------------------------------------


def prepare_store(config: Config, experiment: str, nodes: int = 1) -> str | None:
    """The tracking URI of a run's settings, its store and experiment created; None switches MLflow off.

    Called once by the driver, before any worker starts, since two processes cannot both create a sqlite file.
    Raises `InputError` for a store that MLflow does not know and for a file on this machine when there are
    more `nodes` than one. A server that is down is noted, and raises nothing.
    """
    uri = store_uri(config)
    if uri is None:
        return None
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if scheme.partition("+")[0] not in (
        "http",
        "https",
        "sqlite",
        "postgresql",
        "mysql",
        "mssql",
        "databricks",
    ):
        raise InputError(
            f"tracking.mlflow: {uri}: expected auto, null, http(s)://server, sqlite:///absolute/file.db, "
            "postgresql://... or mysql://..."
        )
    if scheme == "sqlite" and nodes > 1:
        raise InputError(
            f"tracking.mlflow: {uri} is a file of one machine, but the cluster has {nodes} nodes: "
            "start a server (mlflow server --host ...) and give its http:// address, or give null"
        )
    failures = mlflow_failures()
    if scheme == "sqlite":
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        experiment_id(client(uri), experiment)
    except failures as error:
        log.warning("MLflow %s: %s. Runs go on without it; later: mpformer sync RUN", uri, first_line(error))
    return uri


def store_uri(config: Config) -> str | None:
    """The tracking URI that a run's settings mean; None switches MLflow off."""
    if config.tracking.mlflow == "auto":
        return f"sqlite:///{Path(config.storage).resolve() / 'mlflow.db'}"
    return config.tracking.mlflow


def open_parent(folder: Path, uri: str, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The MLflow run above all runs of a study, the same at every call; None where out of reach."""
    path = Path(folder) / "mlflow.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failures = mlflow_failures()
    try:
        store = client(uri)
        if _find_run(store, known.get("run_id")) is not None:
            store.update_run(known["run_id"], status="RUNNING")
            return known["run_id"]
        run = store.create_run(experiment_id(store, experiment), tags=dict(tags), run_name=experiment)
    except failures as error:
        log.warning(
            "MLflow %s: %s. The study's runs will have no common parent there", uri, first_line(error)
        )
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"uri": uri, "run_id": run.info.run_id}), encoding="utf-8")
    return run.info.run_id


def close_parent(uri: str, run_id: str, status: str) -> None:
    """Set the end state of a study's parent run: FINISHED or FAILED."""
    failures = mlflow_failures()
    try:
        client(uri).set_terminated(run_id, status)
    except failures as error:
        log.warning("MLflow %s: %s. The study's parent run stays open there", uri, first_line(error))


def client(uri: str) -> MlflowClient:
    """A client of the store at that tracking URI."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def mlflow_failures() -> tuple[type[Exception], ...]:
    """What a store that is down, full, locked, or without its driver raises."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ImportError)  # requests' exceptions are OSErrors


def _find_run(store: MlflowClient, run_id: str | None) -> Run | None:
    """The run of that id, unless the store never had it or it was deleted there."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = store.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def experiment_id(store: MlflowClient, name: str) -> str:
    """The id of the experiment of that name, created if need be."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(name)
    if found is None:
        try:
            return store.create_experiment(name, artifact_location=_artifact_folder(store.tracking_uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
            found = store.get_experiment_by_name(name)
    return found.experiment_id


def _artifact_folder(uri: str) -> str | None:
    """Beside a database file; MLflow's own default is the working folder, and workers stand elsewhere."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _tags(config: Config, study: str | None) -> dict[str, str]:
    tags = {
        "row" if study else "recipe": config.name,
        "seed": str(config.train.seed),
        "hash": config_hash(config),
    }
    if study:
        tags["study"] = study
    if (commit := git_commit()) is not None:
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
    return tags


def first_line(error: BaseException) -> str:
    """An exception's own words, or its name where it has none, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
