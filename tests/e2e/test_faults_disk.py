"""A disk that is full while a checkpoint is written: a real small file system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.model.weights.checkpoints import latest
from tests.e2e.conftest import Cluster
from tests.e2e.faults import assert_as_unbroken, note, run_dir_of, seconds_until_step_goes_on, starts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FITS_ONE_CHECKPOINT = "9m"  # one is 4.6 MB, MLflow's database 1.2 MB
FITS_ALL = "30m"


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tmpfs. Who may not mount runs the test once more as root of a user namespace, who may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FITS_ONE_CHECKPOINT}", "tmpfs", str(folder)]
    refused = subprocess.run(mount, capture_output=True, text=True)
    if refused.returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    if "MPFORMER_NAMESPACE" in os.environ or shutil.which("unshare") is None:
        pytest.skip(f"no small file system to be had here: {refused.stderr.strip()}")
    again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
    inner = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *again],
        cwd=request.config.rootpath,
        env={**os.environ, "MPFORMER_NAMESPACE": "1"},
    )
    assert inner.returncode == 0
    pytest.skip("passed in a user namespace of its own")


def test_a_full_disk_leaves_the_older_checkpoint_and_room_lets_the_run_go_on(
    recipe: Path, unbroken: Path, small_disk: Path, head: Cluster
) -> None:
    settings = [f"storage={small_disk}"]
    run_dir = run_dir_of(recipe, *settings)
    failed = head.train(recipe, *settings)
    assert failed.code == 1
    told = failed.err.splitlines()[-1]
    final = run_dir / "checkpoints" / "step-00000006"
    assert told.startswith(f"mpformer: {final}: the checkpoint cannot be written: ")
    assert "No space left on device" in told
    assert "Traceback" not in failed.err
    kept, damaged = latest(run_dir)
    assert kept is not None
    assert (kept.step, damaged) == (3, [])

    subprocess.run(["mount", "-o", f"remount,size={FITS_ALL}", "tmpfs", str(small_disk)], check=True)
    since = time.time()
    done = head.train(recipe, *settings)
    assert done.code == 0, done.err
    assert starts(run_dir) == [0, 3]
    assert_as_unbroken(run_dir, unbroken)
    seconds = seconds_until_step_goes_on(run_dir, since)
    note("disk full while a checkpoint is written; room made", seconds=seconds, lost=0, difference=0.0)
