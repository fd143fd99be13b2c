"""One version number, and files for a public host that agree with the package."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from mpformer import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_metadata_take_the_version_from_the_package():
    # tests/test_wheel.py looks into the wheel, tests/tracking/test_tracker.py at what MLflow is told
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mpformer.__version__"}


def test_the_changelog_begins_with_the_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)


def test_the_command_says_the_version(capsys):
    from mpformer.cli.main import main

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mpformer {__version__}\n"


def test_images_bear_the_version():
    files = [*(ROOT / "cluster").rglob("*.yaml"), ROOT / "cluster/Dockerfile", *(ROOT / "docs").glob("*.md")]
    tags = {tag for path in files for tag in re.findall(r"/mpformer:([\d.]+)-ray", path.read_text())}
    assert tags == {__version__}


def test_continuous_integration_covers_the_supported_pythons():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    job = jobs["all"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    lowest, above = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    assert job["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(int(lowest), int(above))]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_valid(path):
    if (actionlint := shutil.which("actionlint")) is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([actionlint, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_pre_commit_runs_what_lint_runs():
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = [" ".join(hook["entry"].removeprefix(".venv/bin/").split()[:2]) for hook in repo["hooks"]]
    assert tools == ["ruff check", "ruff format", "mypy"]
