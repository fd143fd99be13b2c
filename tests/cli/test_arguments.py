"""What is a setting, an option or a path on the command line, and the commands that the program prints."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mpformer.cli import checkpoints
from mpformer.cli.main import main
from mpformer.cli.parser import FLAGS, VALUED, build_parser, parse
from mpformer.config import load_config
from mpformer.data.synthetic import generate
from mpformer.shell import place
from mpformer.types import InputError

NAMES = [
    "set #2",
    "2024-01-15",
    "007",
    "größe",
    "it's $HOME",
    "a=b",
    "-x",
    "null",
    "a\nb",
    "a  b",
    "~",
    "yes",
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_options_are_those_of_the_parser():
    found: dict[bool, set[str]] = {True: set(), False: set()}

    def collect(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    collect(inner)
            else:
                # one that may stand alone names no path: what follows is left to argparse
                found[action.nargs not in (0, "?")] |= set(action.option_strings)

    collect(build_parser())
    assert (found[True], found[False]) == (set(VALUED), set(FLAGS))


def predicted(*arguments: str) -> dict[str, object]:
    function, found = parse(["predict", "run", *arguments])
    assert function is checkpoints.predict
    return found


def test_what_exists_is_a_path(here):
    for name in ("a=b", "-x"):
        (here / name).mkdir()
        (here / name / "1.png").touch()
    found = predicted("a=b/1.png", "a=b", "-x", "-x/1.png", "train.lr=1", "c=d/1.png", "--out", "o")
    assert found["images"] == ["a=b/1.png", "a=b", "./-x", "./-x/1.png"]
    assert found["settings"] == ["train.lr=1", "c=d/1.png"]
    assert predicted("./c=d/1.png", "--out", "o")["images"] == ["./c=d/1.png"]
    assert predicted("--out", "o", "--", "-n.png", "c=d.png")["images"] == ["-n.png", "c=d.png"]


@pytest.mark.parametrize("out", ["a=b", "-x", "-", "o"])
def test_the_value_of_an_option_is_never_a_setting(here, out):
    assert predicted("1.png", "--out", out, "train.lr=1") == {
        "checkpoint": "run",
        "images": ["1.png"],
        "out": out,
        "score": None,
        "settings": ["train.lr=1"],
    }
    assert predicted("1.png", "--ou", out)["out"] == out, "a shortened option"


@pytest.mark.parametrize("line", [["data", "check", "-x"], ["predict", "run", "-x.png", "--out", "o"]])
def test_a_missing_path_that_looks_like_an_option_is_told_how_it_is_written(here, line):
    with pytest.raises(InputError, match=r"if '-x(\.png)?' is a path, it is written \./-x"):
        parse(line)


def test_a_setting_for_a_command_without_any_may_be_a_path(here):
    with pytest.raises(InputError, match=r"if 'a=b' is a path, it is written \./a=b"):
        parse(["sync", "a=b"])
    with pytest.raises(InputError, match="`mpformer sync` takes no settings"):
        parse(["sync", "run", "train.lr=1"])
    (here / "a=b").mkdir()
    assert parse(["sync", "a=b"])[1] == {"run": "a=b"}


def pasted(command: str) -> list[str]:
    """The arguments that a shell hands to `mpformer`."""
    receiver = 'mpformer() { for a in "$@"; do printf \'%s\\0\' "$a"; done; }\n'
    done = subprocess.run(["sh", "-c", receiver + command], capture_output=True, check=True, timeout=60)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_check_trains_on_the_folder(here, capsys, name):
    generate(here / name, {"train": 2, "val": 1}, size=64)
    assert main(["data", "check", name]) == 0
    [command] = [
        line.removeprefix("train on it: ")
        for line in capsys.readouterr().out.split("\n")
        if line.startswith("train on it: ")
    ]
    function, arguments = parse(pasted(command))
    config = load_config(arguments["recipe"], arguments["settings"])
    assert (Path(config.data.root).resolve(), function.__name__) == ((here / name).resolve(), "train")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "~"])
def test_the_command_of_a_checked_recipe_is_that_recipe_with_its_settings(here, capsys, name):
    generate(here / name, {"train": 2, "val": 1}, size=64)
    files = "train: {images: train2017, annotations: annotations/instances_train2017.json}"
    files += ", val: {images: val2017, annotations: annotations/instances_val2017.json}"
    (here / f"{name}.yaml").write_text(f"data: {{root: nowhere, dataset: {{{files}}}}}\n")
    assert main(["data", "check", f"{name}.yaml", f"data.root={name}"]) == 0
    command = capsys.readouterr().out.partition("train on it: ")[2].rstrip("\n")
    _, arguments = parse(pasted(command))
    assert load_config(**{"path": arguments["recipe"], "overrides": arguments["settings"]}).data.root == name


@pytest.mark.parametrize("name", NAMES)
def test_the_hint_of_a_packed_set_is_yaml(here, capsys, name):
    generate(here / "set", {"train": 2, "val": 1}, size=64)
    assert main(["data", "pack", "set", place(name)]) == 0
    hint = capsys.readouterr().out.partition("in a recipe: ")[2]
    (here / "recipe.yaml").write_text(hint)
    assert Path(load_config("recipe.yaml").data.root) == Path(name)
    assert yaml.safe_load(hint)["data"]["dataset"] == {"format": "packed"}


@pytest.mark.parametrize("name", ["a  b", "set #2", "-x", "a=b", "a\nb"])
def test_a_command_in_an_error_survives_the_line(here, capsys, name):
    """The runs of a study that is not begun: the message says how, in one line."""
    (here / "recipe.yaml").write_text("tracking: {mlflow: null}\n")
    study = "title: t\nbase: recipe.yaml\ncolumns: {val/AP: {title: AP}}\nbaseline: a\nrows: {a: {}}\n"
    Path(f"{name}.yaml").write_text(study)
    assert main(["report", f"{name}.yaml", f"storage={name}", "from=mlflow", "tracking.mlflow=mlruns"]) == 2
    capsys.readouterr()
    assert main(["report", f"{name}.yaml", f"storage={name}", "train.lr=1"]) == 2
    [line] = capsys.readouterr().err.rstrip("\n").split("\n")
    command = line.partition("with these settings: ")[2].removesuffix(" starts them")
    _, arguments = parse(pasted(command))
    assert Path(arguments["study_file"]) == Path(f"{name}.yaml")
    assert arguments["settings"] == [f"storage={name}", "train.lr=1"]


def test_the_commands_of_other_modules_are_made_by_the_one_helper():
    """Text that names one of our commands and fills something in is written by `mpformer.shell.command`."""
    root = Path(__file__).parents[2] / "mpformer"
    surface = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    names = "|".join(surface[0].choices)
    wrong = re.compile(rf"mpformer (?:{names})\b[^\"`]*(?:\{{\w|%[sd])")
    found = [f"{path}: {m[0]}" for path in root.rglob("*.py") for m in wrong.finditer(path.read_text())]
    assert found == []
    assert wrong.search('f"later: mpformer sync {run_dir}"')


def test_quoting_is_not_needed_for_plain_names(here, capsys):
    generate(here / "flowers", {"train": 2, "val": 1}, size=64)
    assert main(["data", "check", "flowers"]) == 0
    command = capsys.readouterr().out.partition("train on it: ")[2].strip()
    assert command.startswith("mpformer train laptop-instance data.root=flowers")
    assert shlex.split(command) == command.split()
