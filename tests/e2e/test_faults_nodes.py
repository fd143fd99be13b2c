"""Machines that go: two Ray nodes on this machine, one taken away, with and without a warning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpformer.model.weights import checkpoints
from mpformer.tracking.record import read_points
from tests.e2e.conftest import run, start
from tests.e2e.faults import (
    at_step,
    difference,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    values,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# a worker fills a node; the data tasks have the head
ON_NODES = ["cluster.cpus_per_worker=1.5", "tracking.mlflow=null"]
NODE = {"num_cpus": 2, "object_store_memory": 200 << 20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without room for a worker; commands that are told its address join it, and no others."""
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    reset_ray_address()
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield nodes
    nodes.shutdown()


def test_a_node_is_lost_and_the_run_goes_on_with_those_left(recipe: Path, cluster: Any) -> None:
    common = [*ON_NODES, "evaluate.every=null", "train.length=60 steps"]
    settings = [*common, "cluster.workers=2", "cluster.min_workers=1"]
    run_dir = run_dir_of(recipe, *settings)
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    process = start("train", recipe, *settings)
    wait_for(at_step(run_dir, 3), process)
    cluster.remove_node(nodes[0], allow_graceful=False)
    seconds = seconds_until_step_goes_on(run_dir, process, time.time())
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["workers"]) == (60, 1)

    alone = [*common, f"storage={recipe.parent / 'alone'}"]
    assert run("train", recipe, *alone, timeout=300).returncode == 0
    mine, unbroken = values(run_dir), values(run_dir_of(recipe, *alone))
    assert mine.keys() == unbroken.keys()
    first = json.loads(sorted((run_dir / "metrics").glob("*.jsonl"))[-1].read_text().splitlines()[0])
    step = first["start_step"] + 1
    assert mine[step, "train/loss"] == pytest.approx(unbroken[step, "train/loss"], rel=1e-3)
    note("a node of two removed; goes on with one", seconds=seconds, lost=0, difference=None)


def test_a_spot_warning_makes_a_checkpoint_at_once(recipe: Path, cluster: Any) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    common = ["evaluate.every=null", "train.length=150 steps", "train.checkpoint_every=150 steps"]
    settings = [*ON_NODES, *common]
    run_dir = run_dir_of(recipe, *settings)
    first = cluster.add_node(**NODE)
    process = start("train", recipe, *settings)
    wait_for(lambda: (run_dir / "progress.json").exists() and read_points(run_dir), process)
    cluster.add_node(**NODE)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 120) * 1000)
    warned = time.time()
    accepted, message = GcsClient(address=cluster.address).drain_node(first.node_id, reason, "spot", deadline)
    assert accepted, message
    wait_for(lambda: checkpoints.complete(run_dir), process, 60)
    warning = time.time() - warned
    saved = int(checkpoints.complete(run_dir)[0].name[-8:])
    assert 0 < saved < 150

    cluster.remove_node(first, allow_graceful=False)
    seconds = seconds_until_step_goes_on(run_dir, process, time.time())
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    started = json.loads(sorted((run_dir / "metrics").glob("*.jsonl"))[-1].read_text().splitlines()[0])
    assert started["start_step"] == saved

    alone = [*settings, f"storage={recipe.parent / 'alone'}"]
    assert run("train", recipe, *alone, timeout=300).returncode == 0
    unbroken = run_dir_of(recipe, *alone)
    assert values(run_dir) == values(unbroken)
    assert difference(run_dir, unbroken) == 0
    note(
        f"spot warning (checkpoint after {warning:.1f} s), then lost", seconds=seconds, lost=0, difference=0.0
    )
