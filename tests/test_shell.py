"""Commands in messages can be pasted: a shell gives back the arguments that they were made of."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpformer.shell import command, place

SHELLS = [name for name in ("sh", "dash", "bash") if shutil.which(name)]
RECEIVER = 'mpformer() { for a in "$@"; do printf \'%s\\0\' "$a"; done; }\n'
NAMES = [
    *(
        "set #2",
        "it's",
        'a"b',
        "$HOME",
        "`id`",
        "größe",
        "😀",
        "a\nb",
        "a\nb\n\n",
        "-x",
        "--plan",
        "a=b",
        "a\\b",
    ),
    *(
        "50%",
        "!x y\n!",
        "\t",
        "caf\udce9.png",
        "~",
        "*",
        "a  b",
        "\u200b",
        ";rm",
        "a&b",
        "{a,b}",
        "\r",
        "- -",
    ),
    *("\x1b[1m", "'\n'", "%s\n\\", "-\n-"),
]


def received(text: str, shell: str) -> list[str]:
    done = subprocess.run([shell, "-c", RECEIVER + text], capture_output=True, check=True, timeout=60)
    return [os.fsdecode(argument) for argument in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_shell_gives_back_the_arguments(shell, name):
    text = command("train", Path(name), f"data.root={name}")
    assert received(text, shell) == ["train", place(name), f"data.root={name}"]
    assert ("\n" in text) == name.endswith("\n"), "one line"


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_text(texts):
    assert received(command("train", *texts), SHELLS[0]) == ["train", *texts]


def test_plain_commands_stay_plain():
    assert (
        command("train", Path("runs/a-1.yaml"), "train.lr=1e-4")
        == "mpformer train runs/a-1.yaml train.lr=1e-4"
    )


def test_a_terminal_that_lacks_a_character_gets_its_bytes(monkeypatch, tmp_path):
    with (tmp_path / "ascii").open("w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        text = command("sync", "größe")
    assert text.isascii()
    assert received(text, SHELLS[0]) == ["sync", "größe"]


@pytest.mark.parametrize(
    ("path", "written"),
    [("-x", "./-x"), ("a=b/c", "./a=b/c"), ("./a=b", "./a=b"), ("a/b=c", "a/b=c"), ("x", "x")],
)
def test_a_path_is_no_option_and_no_setting(path, written):
    assert place(path) == written
