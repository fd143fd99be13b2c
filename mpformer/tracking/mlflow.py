"""MLflow as a tracker of runs: a run's link to its MLflow run, the feed, and artefacts of a later time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mpformer.config import Config
from mpformer.tracking.entry import Entry
from mpformer.tracking.feed import Feed, Note
from mpformer.tracking.mlflow_store import client, experiment_id, find_run, first_line, mlflow_failures
from mpformer.tracking.record import Point, read_metrics
from mpformer.tracking.run_dir import PICTURES, RunDir, StudyDir

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
"""MLflow's limits for one `log_batch`."""


@dataclass(frozen=True, kw_only=True)
class Link(Note):
    """`RUN/mlflow.json`: the MLflow run of a run, and how much of the record it may have."""

    uri: str
    experiment: str
    run_name: str
    parent_run_id: str | None
    tags: dict[str, str]
    params: dict[str, str]
    run_id: str | None = None

    @classmethod
    def of(cls, run_dir: Path, config: Config, entry: Entry, uri: str, start_step: int, name: str) -> Self:
        """The link of a run that goes on at `start_step`, in the same MLflow run as before, if any."""
        known = cls.read(run_dir)
        tags = entry.all_tags(config)
        if entry.parent_run_id:
            tags["mlflow.parentRunId"] = entry.parent_run_id
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        return cls(
            uri=uri,
            experiment=entry.experiment,
            run_name=name,
            parent_run_id=entry.parent_run_id,
            tags=tags,
            params=entry.parameters(config),
            run_id=known.run_id if known else None,
            committed_step=start_step,
        )

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """The link of a run; None for one that is not tracked in MLflow. `RunError` for a damaged one."""
        return cls.load(RunDir(Path(run_dir)).mlflow)

    def write(self, run_dir: Path) -> None:
        """Raises `RunError` where it cannot be written."""
        self.save(RunDir(Path(run_dir)).mlflow)


class MlflowFeed(Feed[Link]):
    """Feeds the MLflow run of a run."""

    def __init__(self, run_dir: Path, link: Link) -> None:
        super().__init__(run_dir, RunDir(run_dir).mlflow, link)

    @property
    def name(self) -> str:
        return f"MLflow {self.note.uri}"

    @property
    def place(self) -> str:
        return f"MLflow run {self.note.run_id} at {self.note.uri}"

    def failures(self) -> tuple[type[Exception], ...]:
        return mlflow_failures()

    def _open(self) -> Mapping[str, int]:
        store = client(self.note.uri)
        run = find_run(store, self.note.run_id)
        if run is None:
            self._create(store)
            return {}
        if self.note.status == "RUNNING" and run.info.status != "RUNNING":
            store.update_run(run.info.run_id, status="RUNNING")
        return {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def _create(self, store: MlflowClient) -> None:
        from mlflow.entities import Param

        link = self.note
        if link.parent_run_id:
            experiment = store.get_run(link.parent_run_id).info.experiment_id
        else:
            experiment = experiment_id(store, link.experiment)
        run_id = store.create_run(experiment, tags=link.tags, run_name=link.run_name).info.run_id
        self.advance(run_id=run_id)
        params = [Param(key, value) for key, value in link.params.items()]
        for i in range(0, len(params), PARAMS_PER_CALL):
            store.log_batch(run_id, params=params[i : i + PARAMS_PER_CALL])

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        store, run_id = self._run()
        metrics = [
            Metric(key, value, point.time, point.step)
            for point in points
            for key, value in point.values.items()
        ]
        for i in range(0, len(metrics), METRICS_PER_CALL):
            store.log_batch(run_id, metrics=metrics[i : i + METRICS_PER_CALL])

    def _close(self, status: str) -> None:
        """The run's settings, the pictures and pages of its evaluations, and its final status."""
        store, run_id = self._run()
        files = RunDir(self.run_dir)
        if files.config.is_file():
            store.log_artifact(run_id, str(files.config))
        if files.pictures.is_dir():
            store.log_artifacts(run_id, str(files.pictures), PICTURES)
        store.set_terminated(run_id, status)

    def _run(self) -> tuple[MlflowClient, str]:
        assert self.note.run_id is not None  # `_open` comes first
        return client(self.note.uri), self.note.run_id


def attach(run_dir: Path, step: int, values: Mapping[str, float], folder: Path | None = None) -> str | None:
    """Bring results about a checkpoint, measured after its training, to the MLflow run.

    `folder`, below `RUN/pictures`, if there is one, becomes an artefact; of `values`, measured after `step`
    optimiser steps, those that the run's own record lacks become metrics. Returns one line that says where,
    or why it failed; None for a run that is not tracked in MLflow. Store failures raise nothing.
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
        if folder is not None:
            store.log_artifacts(link.run_id, str(folder), f"{PICTURES}/{folder.name}")
        store.log_batch(link.run_id, metrics=metrics)
    except failures as error:
        return f"MLflow {link.uri}: {first_line(error)}: it does not have {folder or 'them'}"
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
