"""The MLflow store of runs and studies: which one, its experiment, a study's parent run, and its failures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer.config import Config
from mpformer.tracking.run_dir import StudyDir
from mpformer.types import InputError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

# Before mlflow is imported anywhere: no long retries of a dead server, and no log output.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)


def prepare_store(config: Config, experiment: str, nodes: int = 1) -> str | None:
    """The tracking URI of a run's settings, its store and experiment created; None switches MLflow off.

    Called once by the driver, before any worker starts, since two processes cannot both create a sqlite file.
    Raises `InputError` for a store that MLflow does not know and for a file on this machine when there are
    more `nodes` than one. For a server that is down it warns.
    """
    uri = store_uri(config)
    if uri is None:
        return None
    scheme = check_uri(uri)
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


def check_uri(uri: str) -> str:
    """The scheme of a tracking URI. Raises `InputError` for one that MLflow does not know."""
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else "file"
    if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"):
        raise InputError(
            f"tracking.mlflow: {uri}: expected auto, null, http(s)://server, sqlite:///absolute/file.db, "
            "postgresql://... or mysql://..."
        )
    return scheme


def store_uri(config: Config) -> str | None:
    """The tracking URI of a run's settings; None switches MLflow off."""
    if config.tracking.mlflow == "auto":
        return f"sqlite:///{Path(config.storage).resolve() / 'mlflow.db'}"
    return config.tracking.mlflow


def open_parent(folder: Path, uri: str, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The parent MLflow run of a study's runs, the same at every call; None where the store is down."""
    path = StudyDir(Path(folder)).mlflow
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failures = mlflow_failures()
    try:
        store = client(uri)
        if find_run(store, known.get("run_id")) is not None:
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
    """Set the end state of a study's parent run: FINISHED, FAILED or KILLED."""
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


def find_run(store: MlflowClient, run_id: str | None) -> Run | None:
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
            if found is None:  # and has deleted it since
                raise
    return found.experiment_id


def _artifact_folder(uri: str) -> str | None:
    """Next to a database file: MLflow's default is the working folder, which differs between workers."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def first_line(error: BaseException) -> str:
    """The reason on one line: the system's message for an `OSError`, else the exception's, or its name."""
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
