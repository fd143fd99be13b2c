"""A working folder with copies of the examples, as a user has it."""

import shutil
import sys
from pathlib import Path

import pytest

from mpformer import plugin

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder; what was imported from it is forgotten afterwards."""
    for example in EXAMPLES:
        shutil.copy(example, tmp_path)
    monkeypatch.delenv(plugin.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugin, "_made", {})
    yield tmp_path
    for name in ("own", *(example.stem for example in EXAMPLES)):
        sys.modules.pop(name, None)
