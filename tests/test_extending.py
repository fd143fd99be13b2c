"""docs/extending.md: every example is in it, and all of them together train from a folder outside."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import RECIPE
from tests.plugins import folders

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_guide_names_every_example_and_no_other():
    assert set(re.findall(r"\(examples/(\w+\.py)\)", GUIDE)) == {path.name for path in EXAMPLES}


def test_the_guide_s_settings_are_those_of_the_schema():
    from mpformer.config import Config
    from mpformer.config.plugins import references

    (written,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    named = [reference for _, reference in references(Config.model_validate(yaml.safe_load(written)))]
    own = {name for name in (reference.split(":")[0] for reference in named) if not name.startswith("torch.")}
    assert own <= {path.stem for path in EXAMPLES}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_train_from_a_folder_outside_of_the_package(tmp_path):
    """As a user does it: modules beside the recipe, the console script's search path, workers of Ray."""
    for path in EXAMPLES:
        shutil.copy(path, tmp_path)
    folders.yolo(tmp_path / "set", {"train": 8, "val": 3})
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0])
    settings["data"]["root"] = "set"
    settings["data"]["augment"]["options"] = {"size": 64}
    settings["data"]["test_resize"] = {"short": 64, "long": 64}
    for section in ("model", "train", "evaluate"):
        for key, value in RECIPE[section].items():
            inner = settings.setdefault(section, {})
            inner[key] = {**value, **inner.get(key, {})} if isinstance(value, dict) else value
    settings["train"]["length"] = "4 steps"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    script = "import sys; sys.path.remove(''); from mpformer.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "own.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["steps"] == 4
