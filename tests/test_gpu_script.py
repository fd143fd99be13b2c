"""benchmarks/gpu.sh with an interpreter that only notes what it is asked, and what its steps import."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/usr/bin/env bash
case "$*" in
*is_available*) echo "$DEVICE" ;;
*importlib.metadata*) echo "torch 2.11" ;;
*deform_attn.py*) echo "the operator's table" && exit 3 ;;
*inference.py*) echo "begun" && sleep 60 ;;
*) echo "asked for: $*" ;;
esac
"""
IMPORTED = """
import sys
REFUSED = {"ray", "mlflow", "pycocotools", "pyarrow", "matplotlib", "psutil", "rich"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError(f"{name} need not be on a machine with a GPU")
sys.meta_path.insert(0, Refuse())
sys.path[:0] = [".", "benchmarks"]
import train_step, inference, deform_attn, attention
import tests.conftest
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "nvidia-smi": "echo 'NVIDIA H200, 580.1'",
        "compute-sanitizer": 'echo "asked for: $*"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    def started(device, *arguments, budget="30"):
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "DEVICE": device,
            "COMMIT": "abc1234",
            "BUDGET": budget,
        }
        done = subprocess.run(
            ["benchmarks/gpu.sh", *arguments, str(tmp_path / "out")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        page = tmp_path / "out" / "gpu.md"
        return done, page.read_text() if page.exists() else ""

    return started


def steps_of(page):
    """Name and outcome of each step in the page's table."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {name: outcome for name, outcome, *_ in rows if name != "step"}


@pytest.mark.slow  # one step is there to be stopped
def test_a_failing_step_and_one_without_end_leave_the_others_their_turn(run):
    done, page = run("cuda", budget="20")
    assert done.returncode == 1
    assert page.startswith("# NVIDIA H200, ")
    assert "Commit abc1234" in page
    assert "driver 580.1; torch 2.11" in page
    steps = steps_of(page)
    assert list(steps) == [
        "tests/gpu",
        "operator, bfloat16",
        "training step, batch 8",
        "training step, batch 16",
        "training step, batch 16, compiled",
        "attention with masks",
        "inference",
        "profiler trace",
        "compute-sanitizer, memcheck",
        "compute-sanitizer, racecheck",
    ]
    assert steps["operator, bfloat16"] == "3"
    assert steps["tests/gpu"] == steps["attention with masks"] == "0"
    assert steps["inference"].startswith("124 (stopped after ")
    assert steps["profiler trace"] == "left out: no time"
    assert "the operator's table" in page
    assert "begun" in page  # what a step has printed before it was stopped
    assert "--images 16 --only MP-Former,compiled MP-Former" in page


def test_without_a_gpu_only_the_trial_runs_and_says_what_it_leaves_out(run):
    done, page = run("cpu")
    assert done.returncode == 2
    assert "--tiny" in done.stderr
    assert not page
    done, page = run("cpu", "--tiny", budget="12")
    assert "Small sizes, to try the script: no figures." in page
    steps = steps_of(page)
    assert steps["tests/gpu"] == steps["compute-sanitizer"] == "left out: needs CUDA"
    assert steps["training step, batch 2"] == "0"


def test_a_wrong_argument_is_told(run):
    done, page = run("cuda", "--small")
    assert done.returncode == 2
    assert "--small" in done.stderr
    assert not page


def test_its_steps_import_nothing_that_a_machine_with_a_gpu_may_lack():
    modules = [path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")]
    code = IMPORTED + "".join(f"import tests.gpu.{name}\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
