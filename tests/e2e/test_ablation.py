"""A study through Ray Tune: a row that cannot run, and a trial whose driver is killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mpformer.ablation.spec import Study, load_study
from mpformer.model.weights.checkpoints import complete
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import read_points
from tests.e2e.conftest import Cluster
from tests.e2e.faults import meanwhile, starts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STUDY = """\
title: With and without pilots
base: tiny.yaml
settings: {data.loader: ray, train.length: 24 steps, evaluate: {at_start: true, every: null}}
columns:
  val/AP: {title: AP}
  val/PQ: {title: PQ}
  val/mIoU: {title: mIoU}
baseline: plain
rows:
  plain: {settings: {model.pilot.queries: 0}}
  broken: {settings: {model.backbone.pretrained: nowhere.safetensors}}
  piloted: {settings: {model.pilot.queries: 8}}
"""


@pytest.fixture
def study(recipe: Path) -> Study:
    path = recipe.parent / "study.yaml"
    path.write_text(STUDY)
    return load_study(path)


def test_a_study_survives_a_killed_trial_driver_and_reports_the_row_that_failed(
    study: Study, head: Cluster
) -> None:
    trials = {trial.row: trial for trial in study.trials()}
    killed: list[str] = []

    def kill() -> None:
        killed.extend(row for row, trial in trials.items() if complete(trial.run_dir) and not trial.finished)
        drivers = head.processes("ResourceTrainable")
        assert drivers
        for driver in drivers:
            driver.kill()

    with meanwhile(lambda: any(complete(trial.run_dir) for trial in trials.values()), kill):
        done = head.command("ablate", study.path)
    assert done.code == 2, done.err
    assert "1 of 3 runs failed, broken s0: " in done.err
    assert "nowhere.safetensors" in done.err
    assert done.err.strip().count("\n") == 0

    assert killed
    # what was killed went on from its checkpoint: each step once, in two parts
    for row in ("plain", "piloted"):
        run_dir = trials[row].run_dir
        assert json.loads((run_dir / "summary.json").read_text())["steps"] == 24
        assert [p.step for p in read_points(run_dir) if "train/loss" in p.values] == list(range(1, 25))
        if row in killed:
            first, second = starts(run_dir)
            assert (first, second % 3) == (0, 0)
            assert second >= 3

    with (study.folder / "table.csv").open() as file:
        cells = {(line["row"], line["metric"]): line for line in csv.DictReader(file)}
    for row in ("plain", "piloted"):
        summary = json.loads((trials[row].run_dir / "summary.json").read_text())
        for metric in study.file.columns:
            assert float(cells[row, metric]["mean"]) == summary["metrics"][metric]
    assert cells["broken", "val/AP"]["mean"] == ""
    assert cells["untrained", "val/mIoU"]["n"] == "1"
    assert (study.folder / "curve-PQ.png").read_bytes().startswith(b"\x89PNG")

    _check_mlflow(study, [trials["plain"].run_dir, trials["piloted"].run_dir])

    # the finished rows are never run again: nothing is begun, nothing is written but the report
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.jsonl")}
    again = head.command("ablate", study.path, "--only", "plain")
    assert again.code == 0, again.err
    assert "1 finished, 0 begun, 0 to start" in again.out
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.jsonl")} == before


def _check_mlflow(study: Study, run_dirs: list[Path]) -> None:
    """One parent, a child per run with every point of its record once."""
    parent = json.loads((study.folder / "mlflow.json").read_text())
    store = client(parent["uri"])
    assert store.get_run(parent["run_id"]).info.status == "FAILED"  # a row of it has failed
    experiment = store.get_experiment_by_name("study").experiment_id
    for run_dir in run_dirs:
        link = json.loads((run_dir / "mlflow.json").read_text())
        child = store.get_run(link["run_id"])
        assert child.info.experiment_id == experiment
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent["run_id"]
        assert child.data.tags["data"] == "tiny-scenes train: 24 images, tiny-scenes val: 5 images"
        assert len(child.data.tags["data_version"]) == 12
        assert json.loads(child.data.tags["data_generator"])["seed"] == 1
        assert child.data.params.keys() <= {"model.pilot.queries"}  # all that a row changes
        points = {(p.step, key) for p in read_points(run_dir) for key in p.values}
        sent = [
            (m.step, key) for key in child.data.metrics for m in store.get_metric_history(link["run_id"], key)
        ]
        assert len(sent) == len(points)
        assert set(sent) == points
