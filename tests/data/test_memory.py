"""A crowded image needs little memory on its way from the disk to the batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_300_objects_stay_below_120_megabytes():
    """Peak memory of a fresh process, from before the first sample of 1024x1024 to its collated batch."""
    command = [sys.executable, ROOT / "benchmarks" / "data_pipeline.py", "--objects-300"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
    found = re.search(r"(\d+) of them kept: peak memory grows by (\d+) MB", done.stdout)
    kept, grown = int(found[1]), int(found[2])
    assert kept >= 295
    assert grown < 120
