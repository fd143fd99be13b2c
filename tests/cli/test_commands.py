"""The command line: its frozen surface, its exit codes, and what a user is told."""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mpformer.cli import checkpoints, runs, studies
from mpformer.cli.main import main
from mpformer.cli.parser import build_parser, parse
from mpformer.config import load_config, run_name
from mpformer.data.catalog import open_split
from mpformer.data.synthetic import generate
from mpformer.types import InputError, RunError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "experiments/recipes/synthetic-panoptic-tiny.yaml")
STUDY = str(ROOT / "experiments/quickstart.yaml")

SURFACE = {
    "quickstart": ["key=value"],
    "train": ["RECIPE", "key=value"],
    "ablate": ["STUDY", "--plan", "--only ROW", "key=value"],
    "report": ["STUDY", "key=value"],
    "sync": ["RUN"],
    "evaluate": ["CHECKPOINT", "--data D", "key=value"],
    "diagnose": ["CHECKPOINT", "--data D", "key=value"],
    "predict": ["CHECKPOINT", "IMAGE", "--out DIR", "--score S"],
    "export": ["CHECKPOINT", "OUT.onnx", "key=value"],
    "data synth": ["OUT", "key=value"],
    "data check": ["D", "--fix OUT", "--out DIR", "key=value"],
    "data convert": ["SRC", "OUT", "key=value"],
    "data pack": ["D", "OUT", "key=value"],
    "data show": ["D", "--out DIR", "key=value"],
    "data bench": ["D", "key=value"],
    "weights import": ["SRC", "OUT.safetensors"],
    "weights export": ["CHECKPOINT", "DIR"],
    "weights list": [],
    "doctor": [],
    "show": ["RECIPE", "RECIPE2", "--help-settings KEY", "--json-schema KIND", "key=value"],
}


def surface(parser: argparse.ArgumentParser, name: str = "") -> dict[str, list[str]]:
    """Every command with its arguments, as a user writes them."""
    found = {}
    arguments = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub, subparser in action.choices.items():
                found |= surface(subparser, f"{name} {sub}".strip())
        elif action.option_strings and action.dest not in ("help", "version"):
            shown = action.option_strings[-1]
            arguments.append(shown if action.nargs == 0 else f"{shown} {action.metavar}")
        elif not action.option_strings:
            arguments.append(action.metavar)
    return found or {name: arguments}


def test_the_surface_is_frozen():
    """A new command or flag is a decision: settings are key=value."""
    assert surface(build_parser()) == SURFACE


def test_settings_may_stand_anywhere_after_the_command():
    function, arguments = parse(["ablate", "train.lr=1", STUDY, "--plan", "profile=smoke", "--only", "row"])
    assert function is studies.ablate
    assert sorted(arguments.pop("settings")) == ["profile=smoke", "train.lr=1"]
    assert arguments == {"study_file": STUDY, "plan": True, "only": "row"}

    function, arguments = parse(["predict", "run", "a.jpg", "evaluate.top_k=5", "b.jpg", "--out", "out"])
    assert function is checkpoints.predict
    assert (arguments["images"], arguments["settings"]) == (["a.jpg", "b.jpg"], ["evaluate.top_k=5"])


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [one for a in below for sub in a.choices.values() for one in commands(sub)] or [parser]


@pytest.mark.parametrize("command", commands(build_parser()), ids=lambda command: command.prog)
def test_a_command_has_an_argument_for_each_parameter_of_its_function(command):
    arguments = {action.dest for action in command._actions if action.dest != "help"}
    defaults = command._defaults.keys() - {"function", "prog"}
    assert arguments | defaults == set(inspect.signature(command.get_default("function")).parameters)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", TINY, "train.lrr=1"], "setting 'train.lrr=1': no setting 'train.lrr'; nearest: train.lr"),
        (
            ["train", TINY, "train.lr=fast"],
            "setting 'train.lr=fast': train.lr: expected a number above 0 (given: 'fast')",
        ),
        (["train", "tiny.yaml"], "no file tiny.yaml"),
        (["train", TINY, "data.root=nowhere"], "nowhere"),
        (["ablate", STUDY, "--only", "mp-fromer"], "no row 'mp-fromer'; nearest: mp-former"),
        (["ablate", STUDY, "--plan", "profile=papre"], "no profile 'papre'"),
        (["sync", "runs"], "runs: no metrics record here"),
        (["sync", "runs", "a=b"], "`mpformer sync` takes no settings"),
        (["evaluate", "nowhere"], "nowhere: no checkpoint"),
        (["predict", "nowhere", "image.jpg", "--out", "out"], "nowhere: no checkpoint"),
        (["weights", "import", "nowhere.pkl", "out.safetensors"], "nowhere.pkl"),
        (["weights", "export", "nowhere", "out"], "nowhere: no checkpoint"),
        (
            ["predict", "run", "a.jpg", "--out", "o", "--score", "2"],
            "a number from 0 to 1 is expected, not '2'",
        ),
        (["train", TINY, "data.loader=rya"], "'rya' is none of 'ray', 'torch' or 'inline'; nearest: ray"),
        (
            ["data", "check", TINY, "data.dataset.format=coco_panoptc"],
            "setting 'data.dataset.format=coco_panoptc': data.dataset.format: 'coco_panoptc' is none of",
        ),
        (["data", "check", "."], "no COCO annotations in it"),
        (["data", "show", "nowhere.yaml", "--out", "out"], "no file nowhere.yaml"),
        (["data", "synth", "out", "sise=3"], "no such setting here; nearest: size"),
        (["show", TINY, "other.yaml"], "no file other.yaml"),
        (["trian", TINY], "no command 'trian'; nearest: train"),
        (["data", "chekc", "."], "no command 'chekc'; nearest: check"),
        (["train"], "the following arguments are required: RECIPE (usage"),
        (["train", "."], ".: a recipe is expected, not a folder; mpformer data check . prints what trains"),
        (["train", TINY, "train.length=0 steps"], "train.length: expected a length such as '50 epochs'"),
        (["data", "check", "a/instances.json"], "the folder that holds the data is expected, or a recipe"),
        ([], "a command is expected; mpformer --help lists them"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("mpformer: ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_failed_run_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def fail(recipe, settings):
        raise RunError("step 7: the loss\nis not finite")

    monkeypatch.setattr(runs, "train", fail)
    assert main(["train", TINY]) == 1
    assert capsys.readouterr().err == "mpformer: step 7: the loss is not finite\n"


def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(capsys, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    assert main(["data", "synth", str(tmp_path / "runs" / "scenes"), "train=1", "val=1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"mpformer: {tmp_path / 'runs'}")
    assert told.endswith(": Not a directory\n")
    assert told.count("\n") == 1


def test_an_interrupted_run_says_how_it_goes_on(capsys, monkeypatch):
    def train(recipe, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", train)
    assert main(["train", TINY]) == 130
    assert capsys.readouterr().err == "mpformer: interrupted; the same command goes on where it stopped\n"


@pytest.mark.slow
def test_show_prints_settings_that_load_to_the_same_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", TINY, "train.lr=3e-4"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown) == load_config(TINY, ["train.lr=3e-4"])
    assert run_name(load_config(shown)) == run_name(load_config(TINY, ["train.lr=3e-4"]))


@pytest.mark.slow
def test_show_counts_the_model_for_the_classes_of_the_data_or_else_coco_s(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = r"^# [0-9.]+ M parameters, [0-9.]+ G multiply-adds for an image of 128 x 128, "
    assert main(["show", TINY]) == 0
    assert re.search(size + r"80 classes \(assumed", capsys.readouterr().out, re.MULTILINE)
    generate(Path(load_config(TINY).data.root), {"train": 1, "val": 1}, size=64)
    classes = len(open_split(load_config(TINY).data, "val").classes)
    assert main(["show", TINY]) == 0
    told = f"{classes} classes; channels minus 123.675, 116.28, 103.53, divided by 58.395, 57.12, 57.375$"
    assert re.search(size + told, capsys.readouterr().out, re.MULTILINE)


def test_show_of_two_recipes_prints_their_difference(capsys, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {TINY}\nname: synthetic-panoptic-tiny\ntrain: {{batch_size: 4}}\n")
    assert main(["show", TINY, str(other)]) == 0
    assert capsys.readouterr().out.split() == ["train.batch_size", "8", "->", "4"]
    assert main(["show", TINY, TINY]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_data_synth_writes_a_data_set_and_leaves_a_finished_one(capsys, tmp_path):
    out = str(tmp_path / "scenes")
    line = ["data", "synth", out, "train=2", "val=1", "size=64"]
    assert main(line) == 0
    assert len(list((tmp_path / "scenes" / "train2017").iterdir())) == 2
    assert (
        len(json.loads((tmp_path / "scenes/annotations/instances_val2017.json").read_text())["images"]) == 1
    )
    assert main(line) == 0
    assert "as it was" in capsys.readouterr().out
    assert main([*line, "seed=1"]) == 2


def test_data_commands_understand_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "scenes")
    assert main(["data", "synth", folder, "train=8", "val=2", "size=64"]) == 0
    assert main(["data", "check", folder]) == 0
    told = capsys.readouterr().out
    assert "8 images" in told
    assert f"mpformer train laptop-instance data.root={folder}" in told.splitlines()[-1]
    sheet = tmp_path / "runs" / "data-check" / "scenes" / "samples.jpg"
    assert f"16 samples of train with their masks: {sheet.relative_to(tmp_path)}" in told
    assert sheet.stat().st_size < 2e6
    assert main(["data", "check", folder, "--out", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.count(str(tmp_path / "mine" / "samples.jpg")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "runs", "scenes"]
    images = sorted((tmp_path / "scenes" / "train2017").iterdir())
    whole = images[0].read_bytes()
    images[0].write_bytes(b"")
    assert main(["data", "check", folder]) == 2
    told = capsys.readouterr()
    assert "cannot be used: 1" in told.out
    assert f"mpformer: {folder}: cannot be used: 1 (mend them, or leave" in told.err
    images[0].write_bytes(whole)
    assert main(["data", "pack", folder, str(tmp_path / "packed")]) == 0
    assert "8 training and 2 validation images" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "packed")]) == 0
    assert "data.dataset=packed" in capsys.readouterr().out.splitlines()[-1]
    settings = ["data.augment.size=[64, 64]"]
    assert main(["data", "show", folder, "--out", str(tmp_path / "out"), *settings]) == 0
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == ["pilots.png", "samples.png", "train.png", "val.png"]
    capsys.readouterr()
    assert main(["data", "bench", folder, "data.loader=inline", "train.batch_size=2", *settings]) == 0
    told = capsys.readouterr().out
    assert "whole sample" in told
    assert "loader inline: " in told


def test_evaluation_takes_its_data_from_the_run_a_folder_or_a_recipe(tmp_path):
    trained = load_config(TINY)
    run = checkpoints._for_evaluation(trained, "run", None, ["evaluate.limit=3"])
    assert (run.data, run.evaluate.limit) == (trained.data, 3)
    (tmp_path / trained.data.dataset.val.annotations).parent.mkdir(parents=True)
    (tmp_path / trained.data.dataset.val.annotations).write_text("{}")
    folder = checkpoints._for_evaluation(trained, "run", str(tmp_path), [])
    assert folder.data == trained.data.model_copy(update={"root": str(tmp_path)})
    coco = str(ROOT / "experiments/recipes/coco-panoptic-r50.yaml")
    recipe = checkpoints._for_evaluation(trained, "run", coco, ["data.root=/coco"])
    assert recipe.data.dataset == load_config(coco).data.dataset
    assert (recipe.data.root, recipe.model) == ("/coco", trained.model)
    with pytest.raises(InputError, match="no file nowhere"):
        checkpoints._for_evaluation(trained, "run", "nowhere", [])


@pytest.mark.parametrize(("done", "left"), [(1, "0:59 min"), (4, "0:59 min")])
def test_progress_says_the_time_left(done, left, capsys, monkeypatch):
    now = iter([100.0, 100.0 + 59.0 * done, 100.0 + 59.0 * done])
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(now))
    checkpoints._progress()(done, done + 1)
    assert capsys.readouterr().out == f"{done}/{done + 1} images, {left} left\n"


@pytest.mark.slow
def test_doctor_ends_well_with_clear_words():
    done = subprocess.run(
        [sys.executable, "-m", "mpformer", "doctor"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for word in ("torch ", "ray ", "deformable attention on cpu: ", "CPU: ", "GPU", "disk: "):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1].startswith(("no problems found", "problems: "))


def test_doctor_names_what_is_broken(monkeypatch):
    from mpformer.cli import doctor

    assert doctor._installed("no-such-package", "json") == (
        "-",
        "not installed: pip install no-such-package",
    )
    version, trouble = doctor._installed("numpy", "no_such_module")
    assert version != "-"
    assert "cannot be imported: No module named 'no_such_module'" in trouble


@pytest.mark.parametrize(("free", "named"), [(64 * 2**20, True), (8 * 2**30, False)])
def test_doctor_names_a_small_shared_memory(monkeypatch, tmp_path, free, named):
    from mpformer.cli import doctor

    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)  # not /dev/shm, which is not everywhere
    usage = namedtuple("usage", "total used free")
    sizes = {tmp_path: free}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, sizes.get(path, 2**40)))
    problems = []
    told = [line for line in doctor._machine(problems) if line.startswith("shared memory: ")]
    assert ("64 MiB free, so Ray" in told[0]) == named
    assert any("--shm-size" in problem for problem in problems) == named
