"""docs/extending.md names every example; `tests/e2e/test_plugins.py` trains with them."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EXAMPLES = [path for path in sorted((ROOT / "docs" / "examples").glob("*.py")) if path.stem != "run_onnx"]
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
