"""A shipped study from nothing to its report, uninterrupted and killed three times: the same tables."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Cluster
from tests.e2e.faults import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STUDY = Path(__file__).parents[2] / "experiments/ablations/mpformer-table8.yaml"
ROWS = "mask2former,all-layers,shift-noise"


def settings(storage: Path, data: Path) -> list[str]:
    threads = "cluster.threads=1"  # with other threads sums round differently
    # one row after the other, so that a kill comes between two, in one process that takes them all
    alone = ["cluster.cpus_per_worker=5", "data.loader=inline"]
    return ["profile=smoke", f"storage={storage}", f"data.root={data}", threads, *alone, "--only", ROWS]


def test_three_kills_leave_no_trace_in_the_tables(tmp_path: Path, head: Cluster) -> None:
    from mpformer.data.synthetic import generate

    data = tmp_path / "scenes"
    generate(data, {"train": 16, "val": 4}, size=64, things=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = head.command("ablate", STUDY, *settings(whole, data))
    assert done.code == 0, done.err

    moments: list[Callable[[Path], bool]] = [
        lambda folder: any(folder.glob("*/metrics/*.jsonl")),  # a run has just begun
        lambda folder: any(folder.glob("*/checkpoints/step-*")),  # in the midst of one
        lambda folder: any(folder.glob("*/summary.json")),  # between two
    ]
    folder = cut / "mpformer-table8-smoke"
    for reached in moments:
        process = head.start("ablate", STUDY, *settings(cut, data))
        wait_for(functools.partial(reached, folder), process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(finished) == 1, "the last kill was to come between two runs"
    again = head.command("ablate", STUDY, *settings(cut, data))
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    for name in ("table.csv", "table.md"):
        assert (folder / name).read_text() == (whole / "mpformer-table8-smoke" / name).read_text()
    assert "mIoU-L" in (folder / "table.md").read_text()  # figures that differ from run to run
    assert (folder / "report.html").stat().st_size > 10_000
