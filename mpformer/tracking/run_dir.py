"""The files in the folder of a run and of a study: the one place that spells their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS, EVALUATIONS, PICTURES, TRACKERS = "checkpoints", "evaluations", "pictures", "trackers"
MLFLOW_FILE, SUMMARY_FILE = "mlflow.json", "summary.json"
CLASSES_FILE = "classes.csv"
"""The figures of each class, beside the page of an evaluation."""
INHERITED = "0000.jsonl"
"""The part of a record that a run has taken over from another (`train.resume_from`)."""

_CHECKPOINT = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Every property is a path in it, whether or not that exists."""

    path: Path

    @classmethod
    def containing(cls, file: Path) -> RunDir | None:
        """The run that a file lies in; None for a file outside any run."""
        runs = (cls(folder) for folder in file.parents)
        return next((run for run in runs if run.config.is_file()), None)

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """What data the run was begun on (`mpformer.train.rundata`)."""
        return self.path / "data.json"

    @property
    def parent(self) -> Path:
        """From which run, and which step of it, the run goes on (`train.resume_from`)."""
        return self.path / "parent.json"

    @property
    def metrics(self) -> Path:
        """Folder of the metrics record (`mpformer.tracking.record`)."""
        return self.path / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def evaluations(self) -> Path:
        """Folder of weights that have yet to be evaluated (`mpformer.train.background`)."""
        return self.path / EVALUATIONS

    @property
    def pictures(self) -> Path:
        """Folder of overlays and pages of evaluations."""
        return self.path / PICTURES

    @property
    def classes(self) -> Path:
        """The figures of each class at the last evaluation."""
        return self.pictures / CLASSES_FILE

    @property
    def summary(self) -> Path:
        """Exists once the run has reached its last step."""
        return self.path / SUMMARY_FILE

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step."""
        return self.summary.exists()

    @property
    def init(self) -> Path:
        """Which tensors were taken from the weights of `train.init`."""
        return self.path / "init.txt"

    @property
    def progress(self) -> Path:
        """The number of steps, for those who follow the run."""
        return self.path / "progress.json"

    @property
    def warnings(self) -> Path:
        """Warnings of the workers, which have no terminal."""
        return self.path / "warnings.log"

    @property
    def failure(self) -> Path:
        """The failure that ended the run and that a restart cannot mend."""
        return self.path / "failure.json"

    @property
    def mlflow(self) -> Path:
        """The run's MLflow run and how much of the record it may have."""
        return self.path / MLFLOW_FILE

    @property
    def trackers(self) -> Path:
        """Folder of the notes of trackers from outside the package."""
        return self.path / TRACKERS

    def tracker(self, name: str) -> Path:
        """How far a tracker from outside the package has got."""
        return self.trackers / f"{name}.json"

    @property
    def diagnose(self) -> Path:
        """Figures of the pilots by step, measured after training."""
        return self.path / "diagnose.json"

    @property
    def stopped(self) -> Path:
        """Exists once a search has given the run up: at which step. It is not taken up again."""
        return self.path / "stopped.json"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the run."""
        return self.path / ".lock"

    @property
    def report(self) -> ReportDir:
        return ReportDir(self.path / "report")

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def evaluation(self, step: int) -> Path:
        """Weights of a step that have yet to be evaluated."""
        return self.evaluations / f"step-{step:08d}.safetensors"

    def trace(self, step: int) -> Path:
        """The profile of the steps from that one on, counted from 0 (`train.profile`)."""
        return self.path / f"trace-{step:08d}.json.gz"

    def waiting_evaluations(self) -> dict[int, Path]:
        """The weights that have yet to be evaluated, by step, ascending."""
        files = sorted(self.evaluations.glob("*.safetensors"))
        return {step: path for path in files if (step := step_of(path)) is not None}


@dataclass(frozen=True)
class ReportDir:
    """The folder of a report: in that of a run, or that of a study itself."""

    path: Path

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def table_csv(self) -> Path:
        return self.path / "table.csv"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def curve(self, name: str) -> Path:
        """The picture of a curve of that name."""
        return self.path / f"curve-{name}.png"


@dataclass(frozen=True)
class StudyDir(ReportDir):
    """The folder of a study, which holds its report."""

    @property
    def mlflow(self) -> Path:
        """The MLflow run that is the parent of the study's runs."""
        return self.path / MLFLOW_FILE

    @property
    def search(self) -> Path:
        """The table of a search's samples."""
        return self.path / "search.md"


def partial_checkpoint(checkpoint: Path) -> Path:
    """The folder in which a checkpoint is put together before it gets its name."""
    return checkpoint.with_name(f".partial-{checkpoint.name}")


def partial_checkpoints(folder: Path) -> list[Path]:
    """Those that a killed process left in the folder of the checkpoints."""
    return list(folder.glob(".partial-*"))


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder or of weights to evaluate; None for another name."""
    found = _CHECKPOINT.match(path.name.partition(".")[0])
    return int(found[1]) if found else None
