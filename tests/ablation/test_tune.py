"""What is refused before the trials of a study start; the trials themselves: `tests/e2e/test_ablation.py`."""

import fcntl
import subprocess
import sys

import pytest
import ray

from mpformer.ablation.spec import load_study
from mpformer.ablation.tune import _in_its_process, _reason, run_trials
from mpformer.types import RunError


@pytest.mark.slow
@pytest.mark.parametrize("module", ["mpformer.ablation.tune", "mpformer.train.launch"])
def test_ray_s_count_of_processes_is_not_told(module, tmp_path):
    # Ray reads the setting when it is imported: it must be there before
    code = f"import {module}\nfrom ray._private.ray_logging import stdout_deduplicator as told\n"
    code += "lines = ['8 PYTHON worker processes have been started on node: 1', 'a node has died']\n"
    code += (
        "print(told.deduplicate({'lines': lines, 'pid': 'raylet', 'ip': '', 'is_err': False})[0]['lines'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "['a node has died']"


OUT_OF_MEMORY = """\
1 worker(s) were killed due to the node running low on memory.
OOM kill reason: 95.0% of the limit
Refer to the documentation on how to address the out of memory issue"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(OUT_OF_MEMORY), "1 worker(s) were killed due to the node running low on memory."),
        (
            RuntimeError(
                f"Traceback (most recent call last):\nray.exceptions.OutOfMemoryError: {OUT_OF_MEMORY}"
            ),
            "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory.",
        ),
        (
            RuntimeError(
                "ray::drive() (pid=1)\nKeyError: 3\n\nDuring handling of this\nValueError: no such row"
            ),
            "ValueError: no such row",
        ),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_what_ended_a_trial_is_told_in_one_line(error, reason):
    assert _reason(error) == reason


def test_a_study_that_is_being_worked_on_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mpformer.train.launch.SECONDS_OF_AN_ORPHAN", 0.3)
    (tmp_path / "recipe.yaml").write_text(f"storage: {tmp_path / 'runs'}\ndata: {{root: {tmp_path}}}\n")
    (tmp_path / "study.yaml").write_text(
        "title: A study\nbase: recipe.yaml\nbaseline: a\ncolumns: {val/AP: {title: AP}}\n"
        "rows: {a: {}, b: {settings: {train.lr: 1}}}\n"
    )
    study = load_study(tmp_path / "study.yaml")
    busy = study.trials()[1]
    busy.run_dir.mkdir(parents=True)
    with (busy.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the driver of another command holds it
        with pytest.raises(RunError, match=rf"{busy.run_dir.name}: another process is at work on this run"):
            run_trials(study.trials(), study.folder, study.name, None, study.bases)
    assert not ray.is_initialized()


def test_a_process_takes_the_next_trial_unless_one_has_failed_in_it():
    results = iter([{}, {"failure": "no memory", "bad_input": False}])
    trial = object.__new__(_in_its_process(lambda settings: next(results)))
    trial.config = {"trial": 0}
    assert trial.step() == {"done": True}
    assert trial.reset_config({"trial": 1})
    assert trial.step()["failure"] == "no memory"
    assert not trial.reset_config({"trial": 2})
