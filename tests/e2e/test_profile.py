"""Runs that are profiled, and runs whose memory is exhausted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpformer.tracking.record import read_points
from mpformer.tracking.run_dir import RunDir
from mpformer.train import step
from tests.e2e.conftest import Cluster
from tests.e2e.faults import assert_as_unbroken, run_dir_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_out_of_memory_is_one_line_and_goes_on_with_the_setting_it_names(
    recipe: Path, unbroken: Path, head: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched, match = [], step.match_heads

    def exhausted(*args: object) -> object:
        matched.append(args)
        if len(matched) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
        return match(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "match_heads", exhausted)
    failed = head.train(recipe)
    assert failed.code == 1
    assert "Traceback" not in failed.err
    told = failed.err.splitlines()[-1]
    assert told.startswith(
        "mpformer: out of memory in the phase 'match' (2.50 GiB asked for): 4 images with "
    )
    assert "train.micro_batch=2 (now 4;" in told
    monkeypatch.undo()
    # it is no part of the run's identity; the recipe's own batch here, so that the bits are those of one run
    assert head.train(recipe).code == 0
    assert_as_unbroken(run_dir_of(recipe), unbroken)


def test_a_profiled_run_leaves_a_trace_and_computes_the_same(
    recipe: Path, unbroken: Path, head: Cluster
) -> None:
    done = head.train(recipe, "train.profile=2")
    assert done.code == 0, done.err
    run_dir = run_dir_of(recipe, "train.profile=2")
    assert run_dir == run_dir_of(recipe)
    assert [file.name for file in run_dir.glob("*.json.gz")] == [RunDir(run_dir).trace(10).name]
    assert_as_unbroken(run_dir, unbroken)
    # beside images per second the memory; no utilisation on a CPU
    speed = [{key for key in point.values if key.startswith("speed/")} for point in read_points(run_dir)]
    assert {"speed/images_per_second", "speed/peak_memory_gib"} <= speed[0]
    assert not any("speed/mfu" in keys for keys in speed)
