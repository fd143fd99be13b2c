"""Machines that go: Ray nodes on this machine, one taken away, with and without a warning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpformer.model.weights.checkpoints import complete
from mpformer.tracking.record import read_points
from tests.e2e.conftest import WITH_RAY, Cluster, started_cluster
from tests.e2e.faults import (
    at_step,
    difference,
    meanwhile,
    note,
    run_dir_of,
    seconds_until_step_goes_on,
    starts,
    values,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# a worker fills a node; the data tasks have the head
COMMON = ["cluster.cpus_per_worker=1.5", "tracking.mlflow=null", "evaluate.every=null", "evaluate.limit=1"]
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head without room for a worker."""
    with started_cluster(cpus=1) as started:
        yield started


def two_nodes(nodes: Any) -> list[Any]:
    """Two machines for a worker each beside the head: those that are left, and new ones."""
    while len(nodes.worker_nodes) < 2:
        nodes.add_node(**NODE)
    return list(nodes.worker_nodes)


@pytest.fixture
def fleet(nodes: Any) -> Cluster:
    quick = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    return Cluster(nodes.address, quick)


def train_alone(fleet: Cluster, recipe: Path, *settings: str) -> Path:
    """The folder of the same run in one process."""
    alone = [*settings, f"storage={recipe.parent / 'alone'}"]
    done = fleet.train(recipe, *alone)
    assert done.code == 0, done.err
    return run_dir_of(recipe, *alone)


def test_a_node_is_lost_and_the_run_goes_on_with_those_left(recipe: Path, nodes: Any, fleet: Cluster) -> None:
    common = [*COMMON, "train.length=60 steps"]
    settings = [*common, WITH_RAY, "cluster.workers=2", "cluster.min_workers=1"]
    run_dir = run_dir_of(recipe, *settings)
    first, _ = two_nodes(nodes)
    lost: list[float] = []

    def lose() -> None:
        nodes.remove_node(first, allow_graceful=False)
        lost.append(time.time())

    with meanwhile(at_step(run_dir, 3), lose):
        done = fleet.command("train", recipe, *settings)
    assert done.code == 0, done.err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["workers"]) == (60, 1)
    assert len(starts(run_dir)) > 1

    mine, unbroken = values(run_dir), values(train_alone(fleet, recipe, *common))
    assert mine.keys() == unbroken.keys()
    step = starts(run_dir)[-1] + 1
    assert step > 3
    assert mine[step, "train/loss"] == pytest.approx(unbroken[step, "train/loss"], rel=1e-3)
    seconds = seconds_until_step_goes_on(run_dir, lost[0])
    note("a node of two removed; goes on with one", seconds=seconds, lost=0, difference=None)


def test_a_spot_warning_makes_a_checkpoint_at_once(recipe: Path, nodes: Any, fleet: Cluster) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a Cython module without types
    from ray.core.generated import autoscaler_pb2

    settings = [*COMMON, "train.length=150 steps", "train.checkpoint_every=150 steps"]
    run_dir = run_dir_of(recipe, *settings)
    spare = two_nodes(nodes)
    lost: list[float] = []
    saved: list[int] = []

    def warn_and_lose() -> None:
        (worker,) = fleet.processes("RayTrainWorker")
        (node,) = (n for n in spare if n.all_processes["raylet"][0].process.pid == worker.ppid())
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + 120) * 1000)
        warned = time.time()
        accepted, message = GcsClient(address=nodes.address).drain_node(
            node.node_id, reason, "spot", deadline
        )
        assert accepted, message
        wait_for(lambda: complete(run_dir), seconds=60)
        saved.append(int(complete(run_dir)[0].name[-8:]))
        lost.extend((warned, time.time()))
        nodes.remove_node(node, allow_graceful=False)

    with meanwhile(lambda: (run_dir / "progress.json").exists() and read_points(run_dir), warn_and_lose):
        done = fleet.command("train", recipe, *settings)
    assert done.code == 0, done.err
    assert 0 < saved[0] < 150
    assert starts(run_dir) == [0, saved[0]]

    unbroken = train_alone(fleet, recipe, *settings)
    assert values(run_dir) == values(unbroken)
    assert difference(run_dir, unbroken) == 0
    seconds, warning = seconds_until_step_goes_on(run_dir, lost[1]), lost[1] - lost[0]
    note(
        f"spot warning (checkpoint after {warning:.1f} s), then lost", seconds=seconds, lost=0, difference=0.0
    )
