"""The record of a run and what MLflow holds of it, read from its sqlite file."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mpformer import __version__
from mpformer.config import Config, config_hash
from mpformer.tracking import mlflow_store
from mpformer.tracking.commit import git_commit
from mpformer.tracking.entry import Entry
from mpformer.tracking.mlflow import Link, attach
from mpformer.tracking.mlflow_store import prepare_store
from mpformer.tracking.record import read_metrics, read_summary
from mpformer.tracking.tracker import Tracker, close_run, sync
from mpformer.types import InputError, RunError
from tests.servers import closed_port


@pytest.fixture
def storage(tmp_path, empty_store) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


TAGS = {"data_version": "0123456789ab", "search.model.pilot.layers": "first"}


def settings(storage: Path, mlflow: str | None = "auto", **train) -> Config:
    return Config.model_validate(
        {"name": "tiny", "storage": str(storage), "tracking": {"mlflow": mlflow}, "train": train}
    )


def begin(storage: Path, start_step: int = 0, uri: str | None = "auto", parent: str | None = None) -> Tracker:
    config = settings(storage, uri, seed=3)
    return Tracker.open(
        storage / "run",
        config,
        start_step=start_step,
        entry=Entry("study", parent, tags=TAGS),
        mlflow_uri=prepare_store(config, "study"),
        run_name="tiny s3",
    )


def in_mlflow(storage: Path, run_id: str) -> Counter:
    """How often MLflow holds each (key, step) of a run."""
    with sqlite3.connect(storage / "mlflow.db") as db:
        return Counter(db.execute("select key, step from metrics where run_uuid = ?", [run_id]).fetchall())


def in_record(storage: Path) -> Counter:
    return Counter((key, step) for step, values in read_metrics(storage / "run") for key in values)


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"train/loss": 100.0 / (step + 1), "speed/images_seen": 8.0 * step})


def test_the_record_is_there_at_once_and_needs_no_mlflow(tmp_path):
    tracker = begin(tmp_path, uri=None)
    tracker.log(5, {"train/loss": 2.5})
    assert read_metrics(tmp_path / "run") == [(5, {"train/loss": 2.5})]
    tracker.finish()
    assert tracker.mlflow_run_id is None
    assert not (tmp_path / "run" / "mlflow.json").exists()
    assert "mlflow" not in {path.name for path in tmp_path.iterdir()}


def test_a_resumed_record_is_cut_at_the_restored_step_and_older_parts_stay_untouched(tmp_path):
    first = begin(tmp_path, uri=None)
    log_steps(first, 0, 7)
    part = tmp_path / "run" / "metrics" / "0001.jsonl"
    before = part.read_bytes()
    second = begin(tmp_path, start_step=4, uri=None)
    second.log(5, {"train/loss": -1.0})
    assert part.read_bytes() == before
    assert [step for step, _ in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert read_metrics(tmp_path / "run")[-1] == (5, {"train/loss": -1.0})


def test_a_line_torn_by_a_kill_is_left_out_but_a_damaged_one_is_an_error(tmp_path):
    tracker = begin(tmp_path, uri=None)
    log_steps(tracker, 1, 2)
    part = tmp_path / "run" / "metrics" / "0001.jsonl"
    with part.open("a") as file:
        file.write('{"step": 3, "ti')
    assert [step for step, _ in read_metrics(tmp_path / "run")] == [1, 2]
    part.write_text(part.read_text().replace('"step": 2', '"step" 2'))
    with pytest.raises(RunError, match=r"0001\.jsonl: a damaged line"):
        read_metrics(tmp_path / "run")


def test_values_of_one_step_logged_in_two_calls_become_one_point(tmp_path):
    tracker = begin(tmp_path, uri=None)
    tracker.log(4, {"train/loss": 1.0})
    tracker.log(4, {"val/AP": math.nan})
    [(step, values)] = read_metrics(tmp_path / "run")
    assert step == 4
    assert values["train/loss"] == 1.0
    assert math.isnan(values["val/AP"])
    for line in (tmp_path / "run" / "metrics" / "0001.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN: strict JSON


def test_mlflow_has_only_what_a_checkpoint_covers_until_the_run_ends(storage):
    tracker = begin(storage)
    log_steps(tracker, 0, 9)
    assert in_mlflow(storage, tracker.mlflow_run_id) == Counter()
    tracker.commit(6)
    assert {step for _, step in in_mlflow(storage, tracker.mlflow_run_id)} == set(range(7))
    tracker.finish()
    assert in_mlflow(storage, tracker.mlflow_run_id) == in_record(storage)


def test_a_failed_run_leaves_what_no_checkpoint_covers_to_its_resumption(storage):
    tracker = begin(storage)
    log_steps(tracker, 0, 9)
    tracker.commit(6)
    tracker.finish("FAILED")
    run = mlflow_store.client(prepare_store(settings(storage), "study")).get_run(tracker.mlflow_run_id)
    assert run.info.status == "FAILED"
    assert {step for _, step in in_mlflow(storage, tracker.mlflow_run_id)} == set(range(7))
    again = begin(storage, start_step=6)
    log_steps(again, 7, 12)
    again.finish()
    assert again.mlflow_run_id == tracker.mlflow_run_id
    assert in_mlflow(storage, again.mlflow_run_id) == in_record(storage)
    assert set(in_record(storage).values()) == {1}
    run = mlflow_store.client(prepare_store(settings(storage), "study")).get_run(tracker.mlflow_run_id)
    assert run.info.status == "FINISHED"


def test_the_driver_tells_mlflow_of_a_run_whose_workers_died(storage):
    tracker = begin(storage)
    log_steps(tracker, 0, 9)
    tracker.commit(6)  # and then the worker is gone
    close_run(storage / "run", "FAILED")
    run = mlflow_store.client(prepare_store(settings(storage), "study")).get_run(tracker.mlflow_run_id)
    assert run.info.status == "FAILED"
    assert {step for _, step in in_mlflow(storage, tracker.mlflow_run_id)} == set(range(7))
    close_run(storage / "elsewhere", "FAILED")  # a run that was never tracked: nothing to tell


def test_the_step_0_of_a_run_restarted_from_nothing_is_not_double(storage):
    begin(storage).log(0, {"val/AP": 0.5})  # killed before its first checkpoint
    tracker = begin(storage)
    tracker.log(0, {"val/AP": 0.5})
    tracker.finish()
    assert in_mlflow(storage, tracker.mlflow_run_id) == {("val/AP", 0): 1} == in_record(storage)


def test_a_key_logged_twice_at_one_step_is_one_point_with_the_later_value(storage):
    tracker = begin(storage)
    tracker.log(4, {"speed/images_seen": 32.0, "train/loss": 1.0})
    tracker.log(4, {"speed/images_seen": 33.0, "val/AP": 2.0})
    tracker.commit(4)
    tracker.finish()
    assert in_mlflow(storage, tracker.mlflow_run_id) == in_record(storage)
    [(_, values)] = read_metrics(storage / "run")
    assert values == {"speed/images_seen": 33.0, "train/loss": 1.0, "val/AP": 2.0}


def test_a_restart_behind_what_mlflow_has_doubles_nothing(storage):
    """The newest checkpoint was lost with its disk: the run goes on from an older one."""
    tracker = begin(storage)
    log_steps(tracker, 0, 8)
    tracker.commit(8)
    again = begin(storage, start_step=4)
    log_steps(again, 5, 10)
    again.finish()
    assert set(in_mlflow(storage, again.mlflow_run_id).values()) == {1}
    assert in_mlflow(storage, again.mlflow_run_id) == in_record(storage)


KILLED = """
import os, signal, sys
from pathlib import Path
from mpformer.tracking import mlflow as tracking
from tests.tracking.test_tracker import begin, log_steps
tracker = begin(Path(sys.argv[1]))
log_steps(tracker, 0, 29)
tracking.METRICS_PER_CALL = 7  # the kill falls between the calls of one commit
from mlflow.tracking import MlflowClient
send, calls = MlflowClient.log_batch, []
def log_batch(*args, **kwargs):
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(send(*args, **kwargs))
MlflowClient.log_batch = log_batch
tracker.commit(20)
"""


def test_a_kill_in_the_middle_of_sending_doubles_and_loses_nothing(storage):
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(storage)], env={**os.environ, "PYTHONPATH": str(root)}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    half = Link.read(storage / "run")
    assert sum(in_mlflow(storage, half.run_id).values()) == 28
    tracker = begin(storage, start_step=20)
    assert tracker.mlflow_run_id == half.run_id
    log_steps(tracker, 21, 33)
    tracker.finish()
    assert in_mlflow(storage, half.run_id) == in_record(storage)
    assert set(in_mlflow(storage, half.run_id).values()) == {1}


def test_a_run_deleted_in_mlflow_is_sent_anew_and_whole(storage):
    tracker = begin(storage)
    log_steps(tracker, 0, 5)
    tracker.commit(5)
    mlflow_store.client(prepare_store(settings(storage), "study")).delete_run(tracker.mlflow_run_id)
    again = begin(storage, start_step=5)
    log_steps(again, 6, 8)
    again.finish()
    assert again.mlflow_run_id != tracker.mlflow_run_id
    assert in_mlflow(storage, again.mlflow_run_id) == in_record(storage)


def test_a_moved_storage_goes_on_in_the_same_mlflow_run(storage, tmp_path_factory):
    tracker = begin(storage)
    log_steps(tracker, 0, 5)
    tracker.commit(5)
    elsewhere = tmp_path_factory.mktemp("moved") / "runs"
    shutil.move(storage, elsewhere)
    again = begin(elsewhere, start_step=5)
    log_steps(again, 6, 8)
    again.finish()
    assert again.mlflow_run_id == tracker.mlflow_run_id
    assert in_mlflow(elsewhere, again.mlflow_run_id) == in_record(elsewhere)


def test_child_runs_stand_in_the_study_s_experiment_with_tags_and_changed_settings(storage):
    uri = prepare_store(settings(storage), "study")
    parent = mlflow_store.open_parent(storage / "study", uri, "study", {"study": "study"})
    assert mlflow_store.open_parent(storage / "study", uri, "study", {"study": "study"}) == parent
    tracker = begin(storage, parent=parent)
    tracker.finish()
    run = mlflow_store.client(uri).get_run(tracker.mlflow_run_id)
    assert run.info.experiment_id == mlflow_store.client(uri).get_run(parent).info.experiment_id
    assert run.info.run_name == "tiny s3"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.data.tags["study"], run.data.tags["row"], run.data.tags["seed"]) == ("study", "tiny", "3")
    assert (run.data.tags["git_commit"], run.data.tags["mpformer_version"]) == (git_commit(), __version__)
    assert run.data.tags["hash"] == config_hash(settings(storage))
    assert TAGS.items() <= run.data.tags.items()
    assert run.data.params == {"train.seed": "3"}


def test_parameters_are_the_differences_to_the_base_that_change_what_is_measured(storage):
    base = settings(storage, lr=0.5, batch_size=4)
    row = settings(storage / "study", lr=0.5, batch_size=8, seed=1)
    row = row.model_copy(update={"name": "row", "cluster": row.cluster.model_copy(update={"threads": 2})})
    assert Entry("study", base=base).parameters(row) == {"train.batch_size": "8", "train.seed": "1"}
    assert Entry("study").parameters(row) == {
        "train.batch_size": "8",
        "train.seed": "1",
        "train.lr": "0.5",
    }


def test_the_settings_of_a_run_are_an_artefact(storage):
    tracker = begin(storage)
    (storage / "run" / "config.yaml").write_text("name: tiny\n")
    tracker.finish()
    store = mlflow_store.client(prepare_store(settings(storage), "study"))
    assert [file.path for file in store.list_artifacts(tracker.mlflow_run_id)] == ["config.yaml"]


def test_a_dead_server_stops_nothing_and_sync_brings_everything_later(storage, caplog):
    dead = f"http://127.0.0.1:{closed_port()}"
    tracker = begin(storage, uri=dead)
    log_steps(tracker, 0, 9)
    tracker.commit(6)
    tracker.finish()
    assert tracker.mlflow_run_id is None
    assert len(read_metrics(storage / "run")) == 10
    assert "mpformer sync" in caplog.text
    with pytest.raises(RunError, match=r"127\.0\.0\.1"):
        sync(storage / "run")
    # what a store that answers again looks like
    link = Link.read(storage / "run")
    alive = prepare_store(settings(storage), "other")
    Link(**{**link.__dict__, "uri": alive}).write(storage / "run")
    for _ in range(2):  # a second time changes nothing
        assert "step 9" in sync(storage / "run")
        link = Link.read(storage / "run")
        assert in_mlflow(storage, link.run_id) == in_record(storage)
    assert link.problem is None
    assert mlflow_store.client(alive).get_run(link.run_id).info.status == "FINISHED"


def test_a_store_that_mlflow_does_not_know_and_a_local_file_for_many_nodes_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected auto, null, http"):
        prepare_store(settings(tmp_path, "runs/mlruns"), "study")
    with pytest.raises(InputError, match="3 nodes"):
        prepare_store(settings(tmp_path), "study", nodes=3)
    assert prepare_store(settings(tmp_path, None), "study", nodes=3) is None


def test_sync_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no metrics record"):
        sync(tmp_path)
    begin(tmp_path, uri=None).finish()
    with pytest.raises(InputError, match="not tracked with MLflow"):
        sync(tmp_path / "run")


def test_a_record_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="cannot be written"):
        begin(tmp_path, uri=None)


def artifacts(storage: Path) -> set[str]:
    return {str(p.relative_to(storage)) for p in (storage / "mlartifacts").rglob("*") if p.is_file()}


def test_pictures_and_later_findings_become_artefacts(storage):
    """Beside the database, whatever folder the process stands in; figures of the record stay as they are."""
    tracker = begin(storage)
    tracker.log(4, {"train/loss": 1.0, "diag/layer_iou_1": 50.0})
    pictures = storage / "run" / "pictures"
    pictures.mkdir()
    (pictures / "evaluation.html").write_text("page")
    tracker.finish()
    run_id = tracker.mlflow_run_id
    assert artifacts(storage) == {f"mlartifacts/{run_id}/artifacts/pictures/evaluation.html"}

    found = pictures / "diagnose-step-4"
    found.mkdir()
    (found / "layers.json").write_text("{}")
    told = attach(storage / "run", 4, {"diag/layer_iou_1": 60.0, "diag/PQ_1": 7.0}, found)
    assert run_id in told
    assert f"mlartifacts/{run_id}/artifacts/pictures/diagnose-step-4/layers.json" in artifacts(storage)
    held = in_mlflow(storage, run_id)
    assert held["diag/PQ_1", 4] == held["diag/layer_iou_1", 4] == 1
    store = mlflow_store.client(f"sqlite:///{storage / 'mlflow.db'}")
    assert store.get_run(run_id).data.metrics["diag/PQ_1"] == 7
    assert attach(storage, 4, {}, found) is None


def test_later_findings_survive_a_store_that_is_gone(storage):
    tracker = begin(storage)
    tracker.finish()
    (storage / "run" / "pictures").mkdir()
    (storage / "mlflow.db").unlink()
    (storage / "mlflow.db").mkdir()
    told = attach(storage / "run", 0, {"diag/PQ_1": 7.0}, storage / "run" / "pictures")
    assert "does not have" in told


@pytest.mark.parametrize("content", ['{"metrics": {"val/A', "[]"])
def test_a_damaged_summary_is_named_with_its_remedy(tmp_path, content):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(RunError, match=r"summary\.json: damaged .*: delete it, and the same command"):
        read_summary(tmp_path)


@pytest.mark.parametrize("line", ["[]", "null", "{"])
def test_a_damaged_line_of_the_record_is_named(tmp_path, line):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "0001.jsonl").write_text(f'{{"start_step": 0, "time": 1}}\n{line}\n')
    with pytest.raises(RunError, match=r"0001\.jsonl: a damaged line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"uri": "sqlite:///x"'])
def test_a_damaged_link_to_mlflow_is_named_with_its_remedy(tmp_path, content):
    (tmp_path / "mlflow.json").write_text(content)
    with pytest.raises(RunError, match=r"mlflow\.json: damaged .*: delete it"):
        Link.read(tmp_path)
