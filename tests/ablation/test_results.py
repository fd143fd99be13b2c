"""A study's results from its folder and from MLflow alone, a file or a server, are the same."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mpformer.ablation.report import cells, markdown
from mpformer.ablation.results import RunResult, collect, collect_mlflow, write_pilots
from mpformer.ablation.spec import load_study
from mpformer.tracking.entry import Entry
from mpformer.tracking.mlflow import attach_report
from mpformer.tracking.mlflow_store import client, open_parent, prepare_store, store_uri
from mpformer.tracking.record import RecordWriter
from mpformer.tracking.tracker import Tracker
from mpformer.types import InputError, RunError

STUDY = """\
title: A study
parts:
  instance: {base: recipe.yaml}
  panoptic: {base: recipe.yaml, settings: {data.task: panoptic}}
columns:
  instance:val/AP: {title: AP}
  panoptic:val/PQ: {title: PQ}
baseline: plain
seeds: 2
rows:
  plain: {settings: {model.pilot.queries: 0}}
  pilots: {}
"""


def make(folder: Path, *settings: str):
    (folder / "recipe.yaml").write_text("train: {batch_size: 4}\n")
    (folder / "study.yaml").write_text(STUDY)
    return load_study(folder / "study.yaml", [f"storage={folder / 'runs'}", *settings])


def run_all(study) -> None:
    """Every run as its workers would record it; the last one has not ended."""
    uri = prepare_store(study.base, study.name)
    parent = open_parent(study.folder, uri, study.name, {})
    for number, trial in enumerate(study.trials()):
        tracker = Tracker.open(
            trial.run_dir,
            trial.config,
            start_step=0,
            entry=Entry(study.name, parent, study.bases[trial.part]),
            mlflow_uri=uri,
            run_name=trial.label,
        )
        for step in (0, 10, 20):
            amounts = {"speed/train_seconds": 36.0 * step}
            values = {"val/AP": step + number, "val/PQ": 2 * step + number, "diag/layer_iou_1": 50 + number}
            tracker.log(step, {**values, **amounts})
        tracker.commit(20)
        if number < len(study.trials()) - 1:
            tracker.finish()
            summary = {"metrics": values, "workers": 1, "train_seconds": 720, "images_seen": 80}
            (trial.run_dir / "summary.json").write_text(json.dumps(summary))


def same(study, uri: str) -> None:
    here, there = collect(study), collect_mlflow(study, uri)
    assert cells(study, there) == cells(study, here)
    assert markdown(study, cells(study, there), there) == markdown(study, cells(study, here), here)
    assert "layer 1" in markdown(study, cells(study, there), there)
    run, mirror = here["pilots", "instance"][0], there["pilots", "instance"][0]
    for x in ("images", "steps", "gpu_hours"):
        assert mirror.curve("val/AP", x) == run.curve("val/AP", x)
    assert run.curve("val/AP", "gpu_hours") == [(0, 2), (0.1, 12), (0.2, 22)]
    assert run.metrics["speed/clock_hours"] == 0.2


@pytest.mark.slow
def test_the_store_alone_gives_the_same_report(tmp_path):
    study = make(tmp_path)
    run_all(study)
    same(study, store_uri(study.base))
    # ... wherever the study's folder has gone
    here = cells(study, collect(study))
    shutil.rmtree(study.folder)
    assert cells(study, collect_mlflow(study, store_uri(study.base))) == here
    assert all(cell.ours is None for cell in cells(study, collect(study)))
    (tmp_path / "other.yaml").write_text(STUDY)
    other = load_study(tmp_path / "other.yaml")
    with pytest.raises(RunError, match="no experiment 'other'"):
        collect_mlflow(other, store_uri(study.base))


def test_the_report_becomes_artefacts_of_the_parent_run(tmp_path):
    study = make(tmp_path)
    assert attach_report(study.folder, []) is None  # nothing is tracked there
    uri = prepare_store(study.base, study.name)
    parent = open_parent(study.folder, uri, study.name, {})
    page = tmp_path / "report.html"
    page.write_text("<html>")
    assert attach_report(study.folder, [page]) is None
    assert [file.path for file in client(uri).list_artifacts(parent, "report")] == ["report/report.html"]
    (study.folder / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": "0" * 32}))
    assert "it does not have the report" in attach_report(study.folder, [page])


@pytest.mark.slow
def test_a_server_gives_the_same_report(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.3)
        study = make(tmp_path, f"tracking.mlflow={uri}")
        run_all(study)
        same(study, uri)
    finally:
        server.terminate()
        server.wait(20)


def test_the_best_figures_are_taken_where_the_study_says_so(tmp_path):
    folders = {}
    for figures in ("last", "best"):
        text = f"{STUDY}figures: {figures}\nsettings: {{train.keep.best: val/AP, tracking.mlflow: null}}\n"
        (tmp_path / "recipe.yaml").write_text("train: {batch_size: 4}\n")
        (tmp_path / "study.yaml").write_text(text)
        study = load_study(tmp_path / "study.yaml", [f"storage={tmp_path / 'runs'}", "seeds=1"])
        trial = study.trials()[0]
        if figures == "last":
            writer = RecordWriter(trial.run_dir, 0)
            # of the untrained model no weights are kept: that its figure is the best one is no matter
            for step, value in ((0, 99.0), (10, 30.0), (20, 25.0)):
                writer.add(step, {"val/AP": value, "val/AP50": 2 * step})
            writer.add(5, {"speed/mfu": 7.0})
            writer.add(15, {"speed/mfu": 8.0})
            (trial.run_dir / "summary.json").write_text("{}")
        run = collect(study)[trial.row, trial.part][trial.seed]
        folders[figures] = run.metrics, markdown(study, cells(study, collect(study)), collect(study))
    assert folders["last"][0] == {"val/AP": 25.0, "val/AP50": 40, "speed/mfu": 8.0}
    assert folders["best"][0] == {"val/AP": 30.0, "val/AP50": 20, "speed/mfu": 7.0}
    assert "they flatter" in folders["best"][1]
    assert "flatter" not in folders["last"][1]

    (tmp_path / "study.yaml").write_text(f"{STUDY}figures: best\n")
    with pytest.raises(
        InputError, match=r"study\.yaml:\d+: figures: best needs train\.keep\.best .*plain has"
    ):
        load_study(tmp_path / "study.yaml")


def test_a_run_that_goes_on_from_another_has_no_weights_of_before(tmp_path):
    history = [(10, {"val/AP": 40.0}), (20, {"val/AP": 20.0}), (30, {"val/AP": 30.0}), (40, {"val/AP": 25.0})]
    run = RunResult(history, True, 4, best="val/AP", first=20)
    assert run.metrics == {"val/AP": 30.0}


def test_figures_of_the_pilots_are_those_of_the_weights_that_count(tmp_path):
    """Measured at two steps of one run; those of another, measured by version 0.1, are of its last step."""
    (tmp_path / "recipe.yaml").write_text("train: {batch_size: 4}\n")
    text = "title: x\nbase: recipe.yaml\nbaseline: a\n"
    text += "rows: {a: {}, none: {settings: {model.pilot.queries: 0}}}\n"
    text += "columns: {diag/pilot_layer_iou_1: {title: pilots}}\n"
    text += "settings: {train.keep.best: val/AP, tracking.mlflow: null}\nseeds: 2\n"
    shown = {}
    for figures in ("last", "best"):
        (tmp_path / "study.yaml").write_text(f"{text}figures: {figures}\n")
        study = load_study(tmp_path / "study.yaml", [f"storage={tmp_path / 'runs'}"])
        for trial in study.trials() if figures == "last" else ():
            writer = RecordWriter(trial.run_dir, 0)
            for step, value in ((10, 30.0), (20, 25.0)):
                writer.add(step, {"val/AP": value})
            (trial.run_dir / "summary.json").write_text("{}")
        first, second = (trial for trial in study.trials() if trial.row == "a")
        write_pilots(
            first.run_dir, {20: {"diag/pilot_layer_iou_1": 60.0}, 10: {"diag/pilot_layer_iou_1": 50.0}}
        )
        (second.run_dir / "diagnose.json").write_text('{"diag/pilot_layer_iou_1": 70.0}')
        [cell] = [cell for cell in cells(study, collect(study)) if cell.row == "a"]
        shown[figures] = cell.ours.mean, cell.ours.n, cell.no_such
        [cell] = [cell for cell in cells(study, collect(study)) if cell.row == "none"]
        assert cell.no_such
    assert shown["last"] == (65.0, 2, False)
    assert shown["best"] == (50.0, 1, False)  # of the other run they are not measured yet
    (first.run_dir / "diagnose.json").unlink()
    [cell] = [cell for cell in cells(study, collect(study)) if cell.row == "a"]
    assert (cell.n, cell.no_such) == (0, False)
