"""Tracking of a run: its record (`mpformer.tracking.record`) always, MLflow as the record's mirror.

Points go to MLflow when the checkpoint that covers them is committed, each key in the order of its steps. So
what MLflow has of a key is always a beginning of the record, and MLflow's own latest step of that key says
where to go on: after a kill at any moment no point is double and none is missing. A store that cannot be
reached never stops a run: the reason is noted in `RUN/mlflow.json`, and `sync` brings what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpformer import __version__, atomic
from mpformer.config import Config, config_hash, diff
from mpformer.tracking.commit import git_commit
from mpformer.tracking.mlflow_store import client, experiment_id, find_run, first_line, mlflow_failures
from mpformer.tracking.record import Part, Point, merge_steps, parts, read_metrics, read_points
from mpformer.tracking.run_dir import PICTURES, RunDir, StudyDir
from mpformer.types import InputError, RunError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["Entry", "Link", "Tracker", "attach", "close_run", "read_metrics", "sync"]

log = logging.getLogger(__name__)

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_VALUE = 500
"""MLflow's limits for one `log_batch` and for a parameter's value."""

LONGEST_SHARE_WAITING = 0.02
"""After a failed attempt the store is left alone so long that a dead one takes no more of the time."""


@dataclass(frozen=True)
class Entry:
    """Where a run stands in MLflow, and by what it can be told from the others there."""

    experiment: str
    parent_run_id: str | None = None
    """The run of its study; None for a run of its own."""
    base: Config = field(default_factory=Config)
    """MLflow's parameters of the run are the settings in which it differs from these."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Beside those that follow from the run's settings and from the code."""

    def parameters(self, config: Config) -> dict[str, str]:
        """Of model, data, training and evaluation: the rest does not change what is measured."""
        return {
            key: str(value)[:LONGEST_VALUE]
            for key, (value, _) in diff(config, self.base).items()
            if key.split(".")[0] in ("model", "data", "train", "evaluate")
        }

    def all_tags(self, config: Config) -> dict[str, str]:
        """Name, seed, settings' hash, code and what `tags` holds; MLflow's own names where it has some."""
        tags = {
            "row" if self.parent_run_id else "recipe": config.name,
            "seed": str(config.train.seed),
            "hash": config_hash(config),
            "mpformer_version": __version__,
            **self.tags,
        }
        if self.parent_run_id:
            tags |= {"study": self.experiment, "mlflow.parentRunId": self.parent_run_id}
        if (commit := git_commit()) is not None:
            tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        return tags


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
        entry: Entry,
        mlflow_uri: str | None,
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
            experiment=entry.experiment,
            run_name=run_name,
            parent_run_id=entry.parent_run_id,
            tags=entry.all_tags(config),
            params=entry.parameters(config),
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
        return RunDir(Path(run_dir)).mlflow

    @classmethod
    def read(cls, run_dir: Path) -> Link | None:
        path = cls.path(run_dir)
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path}: damaged ({error}): delete it to go on without; the record is whole, and a run that "
                "goes on brings all of it to a new run of MLflow"
            ) from None

    def write(self, run_dir: Path) -> None:
        path = self.path(run_dir)
        try:
            atomic.write_text(path, json.dumps(asdict(self), indent=1))
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
                self._send_files()
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
        run = find_run(self._client, self.link.run_id)
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

        if self.link.parent_run_id:
            experiment = self._client.get_run(self.link.parent_run_id).info.experiment_id
        else:
            experiment = experiment_id(self._client, self.link.experiment)
        run = self._client.create_run(experiment, tags=self.link.tags, run_name=self.link.run_name)
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

    def _send_files(self) -> None:
        """The run's settings, and the pictures and pages of its evaluations, as they lie in its folder."""
        files = RunDir(self.run_dir)
        if files.config.is_file():
            self._client.log_artifact(self.link.run_id, str(files.config))
        if files.pictures.is_dir():
            self._client.log_artifacts(self.link.run_id, str(files.pictures), PICTURES)


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
        store.log_artifacts(link.run_id, str(folder), f"{PICTURES}/{folder.name}")
        store.log_batch(link.run_id, metrics=metrics)
    except failures as error:
        return f"MLflow {link.uri}: {first_line(error)}: it does not have {folder}"
    return f"MLflow run {link.run_id} at {link.uri} has it, too"


def attach_report(folder: Path, files: Iterable[Path]) -> str | None:
    """Bring a study's report to its parent run as artefacts; why not, where that fails, else None."""
    if not (path := StudyDir(Path(folder)).mlflow).exists():
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
    if RunDir(run_dir).finished:  # killed between its last line and its good-bye to MLflow
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
