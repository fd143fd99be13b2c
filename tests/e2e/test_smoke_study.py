"""A shipped study from nothing to its report, uninterrupted and killed three times: the same tables."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import run, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STUDY = Path(__file__).parents[2] / "experiments/ablations/mpformer-table8.yaml"
ROWS = "mask2former,first-layer,all-layers,shift-noise"


def settings(storage: Path, data: Path) -> list[str]:
    return ["profile=smoke", f"storage={storage}", f"data.root={data}", "--only", ROWS]


def test_three_kills_leave_no_trace_in_the_tables(tmp_path: Path) -> None:
    from mpformer.data.synthetic import generate

    data = tmp_path / "scenes"
    generate(data, {"train": 16, "val": 4}, size=64, things=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("ablate", STUDY, *settings(whole, data), timeout=600)
    assert done.returncode == 0, done.stderr

    moments: list[Callable[[Path], bool]] = [
        lambda folder: any(folder.glob("*/metrics/*.jsonl")),  # a run has just begun
        lambda folder: any(folder.glob("*/checkpoints/step-*")),  # in the midst of one
        lambda folder: any(folder.glob("*/summary.json")),  # between two
    ]
    folder = cut / "mpformer-table8-smoke"
    for reached in moments:
        process = start("ablate", STUDY, *settings(cut, data))
        deadline = time.monotonic() + 300
        while not reached(folder):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert 0 < len(finished) < 4, "the last kill was to come between two runs"
    again = run("ablate", STUDY, *settings(cut, data), timeout=600)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    for name in ("table.csv", "table.md"):
        assert (folder / name).read_text() == (whole / "mpformer-table8-smoke" / name).read_text()
    assert "mIoU-L" in (folder / "table.md").read_text()  # figures that differ from run to run
    assert (folder / "report.html").stat().st_size > 10_000
