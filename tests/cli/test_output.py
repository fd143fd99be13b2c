"""What the commands print where the terminal's encoding lacks a character."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mpformer.ablation.spec import load_study
from mpformer.cli.live import shown
from mpformer.cli.output import print_any_text
from mpformer.data.synthetic import generate
from mpformer.tracking.progress import Follower
from mpformer.tracking.record import RecordWriter

ROOT = Path(__file__).parents[2]
STUDY = """\
title: Rümpfe – λ and α
base: recipe.yaml
columns: {val/AP: {title: AP}}
baseline: plain
seeds: 2
rows:
  plain: {title: ± nothing}
  never: {settings: {train.lr: 1}}
"""
LINES = [
    ["ablate", "study.yaml", "--plan"],
    ["report", "study.yaml"],
    ["show", "recipe.yaml", "recipe.yaml", "name=Rümpfe"],
    ["show", "recipe.yaml", "name=Rümpfe"],
    ["data", "check", "scènes"],
    ["ablate", "study.yaml", "--only", "Rümpfe"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study with a run for each of two seeds, and a data set, named in letters that ASCII lacks."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "recipe.yaml").write_text(f"tracking: {{mlflow: null}}\nstorage: {folder / 'runs'}\n")
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    for trial in load_study(folder / "study.yaml").trials():
        if trial.row == "plain":
            RecordWriter(trial.run_dir, 0).add(20, {"val/AP": 40.0 + trial.seed})
            (trial.run_dir / "summary.json").write_text(json.dumps({"metrics": {"val/AP": 40.0}}))
    generate(folder / "scènes", {"train": 2, "val": 1}, size=64)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "figure", "title"),
    [
        ("ascii", "40.5 +/- 6.4", "Rumpfe - lambda and ?"),
        ("latin-1", "40.5 ± 6.4", "Rümpfe - lambda and ?"),
        ("utf-8", "40.5 ± 6.4", "Rümpfe – λ and α"),
    ],
)
def test_every_encoding_gets_what_it_can_hold_and_no_traceback(folder, encoding, figure, title):
    code = f"from mpformer.cli.main import main\nprint('codes', [main(line) for line in {LINES!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["codes [0, 0, 0, 0, 0, 2]"], done.stderr
    assert f"study: {title}" in done.stdout
    assert figure in done.stdout
    assert " M parameters, " in done.stdout
    assert "no row 'R" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_of_an_ascii_terminal_is_ascii(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    screen = io.BytesIO()
    stream = io.TextIOWrapper(screen, encoding="ascii", write_through=True)
    print_any_text(stream)
    followers = [Follower("Rümpfe ± s0", run_dir, batch_size=8)]
    with shown(followers, print, Console(file=stream, force_terminal=True, width=100, height=30)):
        pass
    assert "Rumpfe +/- s0" in screen.getvalue().decode("ascii")


def test_bytes_of_a_file_name_that_are_no_text_are_printed():
    """As escapes: without a traceback anywhere."""
    name = os.fsdecode(b"caf\xe9.png")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    print_any_text(stream)
    print(name, file=stream)
    assert stream.buffer.getvalue() == b"caf\\xe9.png\n"
