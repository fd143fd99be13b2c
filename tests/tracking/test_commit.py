"""The commit that a run's record names: of this package, wherever it was copied, and of nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpformer.tracking import commit

SOURCE = Path(commit.__file__)
ROOT = SOURCE.parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def package_in(folder: Path) -> Path:
    """A small package of this one's form."""
    package = folder / "mpformer"
    (package / "tracking").mkdir(parents=True)
    (package / "ops" / "csrc").mkdir(parents=True)
    (package / "ops" / "csrc" / "kernel.cpp").write_text("int one;\n")
    (package / "code.py").write_text("x = 1\n")
    for part in (package, package / "tracking"):
        (part / "__init__.py").touch()
    shutil.copy(SOURCE, package / "tracking")
    return package


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package in a repository of one commit."""
    package = package_in(tmp_path / "checkout")
    git(package.parent, "init", "-q")
    (package.parent / ".gitignore").write_text("COMMIT\n__pycache__\n")
    git(package.parent, "add", "-A")
    git(package.parent, "commit", "-qm", "one")
    return package


def test_a_checkout_s_own(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit.commit_of(checkout) == head
    (checkout / "code.py").write_text("x = 2\n")
    assert commit.commit_of(checkout) == head + "-dirty"


def test_never_that_of_a_repository_around_the_environment(checkout):
    inside = package_in(checkout.parent / ".venv")
    assert commit.commit_of(inside) is None
    commit.stamp(inside, "a" * 40)
    assert commit.commit_of(inside) == "a" * 40


@pytest.mark.parametrize("changed", ["code.py", "ops/csrc/kernel.cpp"])
def test_a_copy_without_git_knows_it_from_before(checkout, tmp_path, changed):
    command = [sys.executable, "-m", "mpformer.tracking.commit"]
    done = subprocess.run(command, cwd=checkout.parent, capture_output=True, text=True, check=True)
    head = git(checkout, "rev-parse", "HEAD")
    assert done.stdout.strip() == head
    copy = tmp_path / "copy" / "mpformer"
    shutil.copytree(checkout, copy)
    assert commit.commit_of(copy) == head
    # a file that was stamped for other sources does not pass for theirs
    (copy / changed).write_text("# changed\n")
    assert commit.commit_of(copy) == head + "-dirty"


def test_what_is_built_of_a_copy_knows_it(tmp_path):
    """As an image and the machines of a fleet install it: `pip install` of a folder without `.git`."""
    package = package_in(tmp_path)
    shutil.copy(ROOT / "mpformer" / "ops" / "build.py", package / "ops")
    (package / "__init__.py").write_text('__version__ = "1.0"\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "experiments").mkdir()
    commit.stamp(package, "a" * 40)
    command = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path / 'built'}"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert commit.commit_of(tmp_path / "built" / "mpformer") == "a" * 40


def test_a_copy_that_nobody_stamped_says_so(tmp_path):
    package = package_in(tmp_path)
    assert commit.commit_of(package) is None
    command = [sys.executable, "-m", "mpformer.tracking.commit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "commit is not known" in done.stderr
