"""What the commands do with a run whose data are no longer those that it was begun on, without a cluster."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mpformer.ablation.spec import load_study
from mpformer.cli.main import main
from mpformer.cli.parser import parse
from mpformer.config import load_config
from mpformer.data.version import DataVersion
from mpformer.train import checkpoint, rundata
from mpformer.train.launch import run_directory
from mpformer.train.optim import build_optimizer
from tests.cli.conftest import FinishedRun

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A finished run with a record of its data, which are its own."""
    scenes = tmp_path / "set #2"
    shutil.copytree(finished_run.scenes, scenes)
    recipe = tmp_path / "tiny.yaml"
    text = finished_run.recipe.read_text().replace(str(finished_run.scenes), f'"{scenes}"')
    recipe.write_text(f"{text}tracking: {{mlflow: null}}\n")
    config = load_config(recipe, [f"storage={tmp_path}/runs"])
    folder = run_directory(config)
    shutil.copytree(finished_run.folder, folder, ignore=shutil.ignore_patterns("mlflow.json", "checkpoints"))
    optimizer = build_optimizer(finished_run.model, config.train)
    checkpoint.save(folder, 20, finished_run.model, optimizer, config, {"train_seconds": 120.0})
    rundata.settle(folder, DataVersion(config.data), None)
    return replace(finished_run, recipe=recipe, folder=folder, config=config, scenes=scenes)


def change(scenes: Path, split: str) -> None:
    path = scenes / f"annotations/panoptic_{split}2017.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["segments_info"].pop()
    path.write_text(json.dumps(tree))


def train(run: FinishedRun) -> list[str]:
    return ["train", str(run.recipe), f"storage={run.folder.parent}"]


def test_a_finished_run_prints_its_figures_on_the_same_data(run, capsys, caplog):
    assert main(train(run)) == 0
    assert "val/PQ                  31.25   untrained 1.50" in capsys.readouterr().out
    assert caplog.text == ""


def test_a_finished_run_refuses_to_show_figures_of_other_data(run, capsys):
    change(run.scenes, "train")
    assert main(train(run)) == 2
    out, err = capsys.readouterr()
    assert "31.25" not in out
    assert err.count("\n") == 1
    assert re.search(
        r"was begun on other data: annotations/panoptic_train2017\.json: \d+ annotations instead of \d+; ",
        err,
    )
    anew, onward = re.findall(r"mpformer train [^;]*?(?= - or|\n)", err)
    for text, weights in ((anew, None), (onward, str(run.folder))):
        _, arguments = parse(shlex.split(text)[1:])
        config = load_config(arguments["recipe"], arguments["settings"])
        assert (config.name, config.train.init, config.data) == ("tiny-2", weights, run.config.data)
        assert not run_directory(config).exists()


def test_data_that_are_not_there_are_said_not_to_be_compared(run, capsys, caplog):
    run.scenes.rename(run.scenes.with_name("elsewhere"))
    assert main(train(run)) == 0
    assert "val/PQ                  31.25" in capsys.readouterr().out
    assert "its data were not there to compare: data.root: there is no folder" in caplog.text


def test_a_run_without_a_record_says_so(run, capsys, caplog):
    (run.folder / "data.json").unlink()
    assert main(train(run)) == 0
    assert "its data were not compared" in caplog.text


@pytest.mark.parametrize("command", ["evaluate", "diagnose"])
def test_figures_of_changed_data_are_marked(run, capsys, command):
    """They are measured, but pass for nothing else."""
    assert main([command, str(run.folder)]) == 0
    assert "have changed" not in capsys.readouterr().out
    own = {path.name for path in (run.folder / "pictures").iterdir()}
    change(run.scenes, "train")
    assert main([command, str(run.folder)]) == 0, "the training split is not measured"
    assert "have changed" not in capsys.readouterr().out
    change(run.scenes, "val")
    for data in ([], ["--data", str(run.scenes)]):
        assert main([command, str(run.folder), *data]) == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if "have changed since" in x]
        assert "annotations/panoptic_val2017.json: " in line
    [marked] = {path.name for path in (run.folder / "pictures").iterdir()} - own
    assert marked.endswith("-changed-data")
    pages = (run.folder / "pictures" / marked).glob("[el]*.[jh][st]*")  # evaluation.html, layers.json
    assert ["panoptic_val2017.json" in page.read_text() for page in pages] == [True]


def test_other_data_are_not_compared(run, capsys, finished_run):
    assert main(["evaluate", str(run.folder), "--data", str(finished_run.scenes)]) == 0
    assert "have changed" not in capsys.readouterr().out


STUDY = """\
title: t
base: tiny.yaml
columns: {val/PQ: {title: PQ}}
baseline: a
rows: {a: {}, b: {settings: {train.lr: 2e-4}}}
"""


@pytest.mark.parametrize("finished", [True, False])
def test_a_study_names_the_rows_whose_data_have_changed_and_shows_the_others(run, capsys, tmp_path, finished):
    study_file = tmp_path / "my study.yaml"
    study_file.write_text(STUDY)
    settings = [f"storage={tmp_path}/runs"]
    for trial in load_study(study_file, settings).trials():
        shutil.copytree(run.folder, trial.run_dir)
        if trial.row == "a" and not finished:
            (trial.run_dir / "summary.json").unlink()
        if trial.row == "b":  # begun later
            change(run.scenes, "train")
            (trial.run_dir / "data.json").unlink()
            rundata.settle(trial.run_dir, DataVersion(trial.config.data), None)
    assert main(["ablate", str(study_file), *settings]) == 2
    out, err = capsys.readouterr()
    assert "a s0  failed, the others go on: " in out
    assert "b s0  failed" not in out
    assert re.search(r"\| +PQ", out), "the table is written"
    assert "1 of 2 runs failed, a s0: " in err
    assert err.count("\n") == 1
    command = err.rstrip("\n").partition("begin the study elsewhere: ")[2]
    _, arguments = parse(shlex.split(command)[1:])
    again = load_study(arguments["study_file"], arguments["settings"])
    assert not any(trial.run_dir.exists() for trial in again.trials())
    if not finished:
        return
    run.scenes.rename(run.scenes.with_name("elsewhere"))
    assert main(["ablate", str(study_file), *settings]) == 0
    assert "2 finished runs: its data were not there to compare" in capsys.readouterr().out


def test_reports_and_syncs_need_no_data(run, capsys):
    shutil.rmtree(run.scenes)
    assert main(["report", str(run.folder)]) == 0
