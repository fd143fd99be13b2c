"""Every `mpformer` command line of README.md and docs/*.md.

The parser takes it, the recipes and studies that it names are there and have its settings; what is cheap
is run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.ablation.spec import load_study
from mpformer.cli.main import main
from mpformer.cli.parser import parse
from mpformer.config import load_config
from mpformer.types import InputError

ROOT = Path(__file__).parents[1]
STUDY = "experiments/ablations/mpformer-table8.yaml"
"""In the place of dots: the study that the lines above them name."""


def command_lines(text: str) -> Iterator[tuple[str, str]]:
    """Each command line with the line that follows it: those of code blocks, and spans between backquotes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        lines = [*block.replace("\\\n", " ").splitlines(), ""]
        for line, following in itertools.pairwise(lines):
            if found := re.search(r"(?:^\$ |^|&& |-- )(mpformer [^'|;&]*)", line):
                yield found[1], following
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`(mpformer [^`]*)`", prose):
        yield span.replace("\n", " "), ""


def words(line: str) -> list[str]:
    """The arguments, without comments, explanations and optional parts; dots stand for the study before."""
    line = re.sub(r"\[.*?\]", "", line)
    line = re.split(r"\s{2,}|\s#", line)[0]
    return line.replace("ablate ...", f"ablate {STUDY}").replace("report ...", f"report {STUDY}").split()[1:]


DOCUMENTED = [
    pytest.param(words(line), following, id=f"{path.name}: {' '.join(words(line))}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for line, following in command_lines(path.read_text(encoding="utf-8"))
]
EXAMPLE = re.compile(r"[A-Z]|\.\.\.")
"""What a user puts something of his own in the place of."""


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents' commands are given there."""
    monkeypatch.chdir(ROOT)


def test_commands_are_found() -> None:
    """In blocks and in prose, of the README and of the pages."""
    found = [(parameter.id or "").partition(":")[0] for parameter in DOCUMENTED]
    assert found.count("README.md") > 10
    assert len(set(found)) > 5


@pytest.mark.parametrize(("command", "following"), DOCUMENTED)
def test_a_documented_command_is_one(
    command: list[str], following: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if all(re.fullmatch("[a-z]+", word) for word in command):  # a command's name alone
        with pytest.raises(SystemExit, match="0"):
            parse([*command, "--help"])
        return
    arguments = parse(command)
    if following.startswith("mpformer: setting"):  # an example of an error: it is that error
        assert main(command) == 2
        assert capsys.readouterr().err.rstrip() == following
        return
    settings = [s for s in getattr(arguments, "settings", []) if not s.startswith(("from=", "key="))]
    for name, load in (("recipe", load_config), ("recipe2", load_config), ("study", load_study)):
        file = getattr(arguments, name, None)
        if file is not None and not EXAMPLE.search(file):
            load(file, settings)


CHEAP = sorted({" ".join(command) for command in (p.values[0] for p in DOCUMENTED) if "--plan" in command})


@pytest.mark.parametrize(
    "command", [*CHEAP, pytest.param("show experiments/recipes/coco-tiny.yaml", marks=pytest.mark.slow)]
)
def test_a_documented_plan_or_recipe_is_shown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 0
    assert capsys.readouterr().out.count("\n") > 5


def test_a_command_that_is_none_is_found() -> None:
    text = "```\nmpformer evaluate runs/x --date FOLDER\n```\n"
    ((line, _),) = command_lines(text)
    with pytest.raises(InputError):
        parse(words(line))
