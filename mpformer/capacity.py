"""Which runs fit into a cluster: what plan, launch and data pipeline must agree on. Imports no ray.

A run claims `cluster.cpus_per_worker` logical CPUs for each worker and evaluator, one GPU each where it
trains on GPUs, and CPUs for the Ray Data tasks that prepare its samples. A run that leaves those tasks no CPU
would wait for its first batch for ever, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpformer.config import Config
from mpformer.config.run import Cluster
from mpformer.types import InputError

CPUS_TO_SPARE = 4
"""A cluster with fewer CPUs per worker is small: its data tasks claim less than a CPU."""
SMALL_DATA_TASK = 0.1
"""CPUs that a data task claims on a small cluster."""
_ROUNDING = 1e-9
"""Sums of fractional CPUs are compared with this tolerance."""


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one machine, as Ray counts them."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """The machines of a cluster, whether they are in use or not."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, Any]]) -> Capacity:
        """From `ray.nodes()`; dead machines do not count."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        return cls(tuple(Node(have.get("CPU", 0.0), have.get("GPU", 0.0)) for have in alive))

    @property
    def cpus(self) -> float:
        """Of all machines together."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Of all machines together."""
        return sum(node.gpus for node in self.nodes)

    def uses_gpus(self, cluster: Cluster) -> bool:
        """Whether a run trains on GPUs: as asked for or, for `auto`, if there is one for each worker."""
        return cluster.gpu == "yes" or (cluster.gpu == "auto" and self.gpus >= cluster.least_workers)

    def claim_of_worker(self, cluster: Cluster) -> dict[str, float]:
        """The resources that each worker claims, by Ray's names."""
        gpus = {"GPU": 1.0} if self.uses_gpus(cluster) else {}
        return {"CPU": cluster.cpus_per_worker, **gpus}

    def check_fits(self, config: Config) -> None:
        """Raise `InputError`, with the arithmetic, for a run that this cluster cannot hold."""
        cluster, batch_size = config.cluster, config.train.batch_size
        if cluster.workers > batch_size:
            raise InputError(
                f"cluster.workers: {cluster.workers} workers cannot share a global batch of {batch_size} "
                f"images; at most {batch_size}"
            )
        # Ray Train starts an elastic run with as many workers as there is room for
        workers = max(cluster.least_workers, min(cluster.workers, self._places(cluster)))
        members = workers + cluster.evaluators
        who = f"{workers} workers" + (f" and {cluster.evaluators} evaluators" if cluster.evaluators else "")
        if self.uses_gpus(cluster) and self.gpus < members:
            raise InputError(f"cluster.workers: {who} need a GPU each; the cluster has {self.gpus:g}")
        data = self._data_cpus(workers)
        needed = members * cluster.cpus_per_worker + data
        who += f" x {cluster.cpus_per_worker:g} CPU"
        if needed > self.cpus + _ROUNDING:
            raise InputError(
                f"cluster.workers: {who} + {data:g} for data = {needed:g} CPUs, but the cluster has "
                f"{self.cpus:g}: lower cluster.workers or cluster.cpus_per_worker"
            )
        if self._places(cluster, self.data_task_cpus(workers)) < members:
            raise InputError(
                f"cluster.workers: {who} leave no machine enough for data; the cluster has {self}: "
                "lower cluster.workers or cluster.cpus_per_worker"
            )

    def runs_at_once(self, config: Config) -> int:
        """How many runs with these settings fit at the same time, at least 1.

        On CPUs, several runs at once also need a core for each of their workers and evaluators. Raises
        `InputError`, with the arithmetic, where not even one run fits.
        """
        self.check_fits(config)
        cluster = config.cluster
        members = cluster.workers + cluster.evaluators
        limits = [self._places(cluster, self.data_task_cpus(cluster.workers)) // members]
        if self._is_small_for(cluster.workers):
            needed = members * cluster.cpus_per_worker + self._data_cpus(cluster.workers)
            limits.append(int(self.cpus / needed + _ROUNDING))
        if not self.uses_gpus(cluster):
            limits.append(int(self.cpus) // members)
        return max(1, min(limits))

    def holds_in_one_process(self, config: Config) -> bool:
        """Whether a run needs no more than one process: its only worker, on the only machine."""
        cluster = config.cluster
        return len(self.nodes) == 1 and cluster.workers == 1 and not cluster.evaluators

    def data_task_cpus(self, workers: int) -> float:
        """CPUs that each data task of a run with so many workers claims.

        With CPUs to spare it is a whole one, so that Ray's own accounting keeps all runs within the cluster.
        On a small cluster the workers may leave less than one, and a task of one CPU would never start.
        """
        return SMALL_DATA_TASK if self._is_small_for(workers) else 1.0

    def _data_cpus(self, workers: int) -> float:
        """CPUs that a run must leave to its data: one; on a small cluster a task for each worker."""
        return SMALL_DATA_TASK * workers if self._is_small_for(workers) else 1.0

    def _is_small_for(self, workers: int) -> bool:
        return self.cpus < CPUS_TO_SPARE * workers

    def _places(self, cluster: Cluster, data_task: float = 0.0) -> int:
        """How many workers and evaluators the machines hold, beside one data task of so many CPUs."""
        on_gpu = self.uses_gpus(cluster)

        def fitting(node: Node) -> int:
            by_cpus = int(node.cpus / cluster.cpus_per_worker + _ROUNDING)
            return min(by_cpus, int(node.gpus)) if on_gpu else by_cpus

        everywhere = sum(fitting(node) for node in self.nodes)
        beside_data = [
            everywhere - fitting(node) + fitting(replace(node, cpus=node.cpus - data_task))
            for node in self.nodes
            if node.cpus >= data_task
        ]
        return max(beside_data, default=0)

    def __str__(self) -> str:
        machines = [
            f"{node.cpus:g} CPUs" + (f" + {node.gpus:g} GPUs" if node.gpus else "") for node in self.nodes
        ]
        kinds = {machine: machines.count(machine) for machine in machines}
        return ", ".join(
            f"{count} x ({machine})" if count > 1 else machine for machine, count in kinds.items()
        )


def with_shared_cores(config: Config, capacity: Capacity, at_once: int) -> Config:
    """`cluster.threads` set so that `at_once` such runs share the cores; unchanged on GPUs or if set."""
    cluster = config.cluster
    if cluster.threads is not None or capacity.uses_gpus(cluster):
        return config
    threads = max(1, int(capacity.cpus) // (at_once * (cluster.workers + cluster.evaluators)))
    return config.model_copy(update={"cluster": cluster.model_copy(update={"threads": threads})})
