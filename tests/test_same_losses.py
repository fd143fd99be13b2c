"""The tool that proves optimisations: it finds what differs, and nothing else."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "same_losses.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("same_losses", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_largest_difference_and_its_place(tool):
    a = [{"loss": 1.0, "gradient": 4.0}, {"loss": 2.0, "gradient": 0.0}]
    assert tool.largest_difference(a, a) == (0.0, "")
    b = [{"loss": 1.0, "gradient": 4.0}, {"loss": 2.5, "gradient": 0.0}]
    assert tool.largest_difference(a, b) == (0.2, "step 1, loss")
    assert tool.largest_difference(a, [a[0], {"loss": 2.0}])[0] == math.inf
    assert math.isnan(tool.largest_difference(a, [a[0], {"loss": math.nan, "gradient": 0.0}])[0])


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "code"), [("train.seed=0", 0), ("model.loss.mask_weight=4.9", 1)])
def test_two_settings(setting, code):
    command = [sys.executable, str(FILE), ".", ".", "--b", setting, "--cases", "Mask2Former", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("DIFFERENT" in done.stdout) == bool(code)
