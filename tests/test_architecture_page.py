"""docs/architecture.md and the README's reading list name modules, contracts and calls that exist."""

from __future__ import annotations

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_and_packages_exist():
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", PAGE)) - {"mlartifacts/"}
    missing = [n for n in named if not ((ROOT / "mpformer" / n).exists() or (ROOT / n).exists())]
    assert len(named) > 30
    assert missing == []
    [reading] = re.findall(r"## See these files first\n(.*?)\n\|", README, re.DOTALL)
    files = re.findall(r"`([\w/.-]+)`", reading)
    assert len(files) >= 5
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_package_has_its_row():
    packages = {path.parent.name for path in (ROOT / "mpformer").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^\| `(\w+)/`", PAGE, re.MULTILINE))


@pytest.mark.parametrize("row", re.findall(r"^\| [\w ,-]+ \| 0 \| .* \|$", PAGE, re.MULTILINE))
def test_tables_and_contracts_exist(row):
    _, _, file, contracts = (cell.strip() for cell in row.strip("|").split("|"))
    for path, table in re.findall(r"`([\w/]+)\.py` \(`(\w+)`\)", file):
        assert hasattr(importlib.import_module(f"mpformer.{path.replace('/', '.')}"), table)
    for module, name in re.findall(r"`([\w.]+)\.([A-Z]\w+)`", contracts):
        assert hasattr(importlib.import_module(f"mpformer.{module}"), name)


def test_the_path_of_a_batch_is_at_most_six_calls_that_are_made():
    """Each function names the next one in its body."""
    [line] = re.findall(r"^cli\.runs\.train > .*$", PAGE, re.MULTILINE)
    steps = line.split(" > ")
    assert len(steps) - 1 <= 6
    for caller, called in pairwise(steps):
        module, _, function = caller.rpartition(".")
        [path] = (ROOT / "mpformer").rglob(f"{module.rpartition('.')[2]}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        [body] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert called.rpartition(".")[2] in {n.id for n in ast.walk(body) if isinstance(n, ast.Name)}
