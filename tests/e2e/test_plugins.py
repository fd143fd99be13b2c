"""The worked examples of docs/extending.md train together, from a folder outside of the package."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import RECIPE, Cluster
from tests.plugins import folders
from tests.plugins.conftest import folder  # noqa: F401  (a fixture)

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.mark.slow
def test_the_examples_of_the_guide_train_on_a_cluster(folder: Path, head: Cluster) -> None:  # noqa: F811
    """All of the guide's settings in one recipe, on a model and images that take seconds."""
    folders.yolo(folder / "my-set", {"train": 8, "val": 3})
    (written,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    settings = yaml.safe_load(written)
    settings["data"]["augment"]["options"] = {"size": 64}
    settings["data"]["test_resize"] = {"short": 64, "long": 64}
    for section in ("model", "train", "evaluate", "cluster"):
        chosen = settings.setdefault(section, {})
        for key, value in RECIPE[section].items():
            chosen[key] = {**value, **chosen.get(key, {})} if isinstance(value, dict) else value
    settings["train"]["length"] = "4 steps"
    (folder / "own.yaml").write_text(yaml.safe_dump(settings))
    done = head.command("train", "own.yaml")
    assert done.code == 0, done.err
    (summary,) = folder.glob("runs/*/summary.json")
    result = json.loads(summary.read_text())
    assert result["steps"] == 4
    assert "val/count_error" in result["metrics"]
