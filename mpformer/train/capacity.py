"""What a cluster holds: training workers, and beside them a task that prepares data. Imports no ray."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpformer.config import Config

FEW_CORES_DATA_CPUS = 0.1
"""What a data task claims where there are fewer than four CPUs a worker (`mpformer.data.pipeline`)."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine, as Ray counts them."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """The machines of a cluster."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """Of all machines together."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Of all machines together."""
        return sum(node.gpus for node in self.nodes)

    def members(self, config: Config) -> int:
        """How many workers and evaluators of such a run fit at most.

        None is spread over two machines, and on one machine a task of Ray Data must fit beside them: where
        it fits on none, Ray would wait for that task for ever.
        """
        data_cpus = 1.0 if self.cpus >= 4 * config.cluster.workers else FEW_CORES_DATA_CPUS
        each, on_gpu = config.cluster.cpus_per_worker, uses_gpus(config, self)

        def fitting(node: Node) -> int:
            by_cpus = int(node.cpus / each + 1e-9)
            return min(by_cpus, int(node.gpus)) if on_gpu else by_cpus

        everywhere = sum(fitting(node) for node in self.nodes)
        with_data = [
            everywhere - fitting(node) + fitting(replace(node, cpus=node.cpus - data_cpus))
            for node in self.nodes
            if node.cpus >= data_cpus
        ]
        return max(with_data, default=0)

    def __str__(self) -> str:
        machines = [
            f"{node.cpus:g} CPUs" + (f" + {node.gpus:g} GPUs" if node.gpus else "") for node in self.nodes
        ]
        kinds = {machine: machines.count(machine) for machine in machines}
        return ", ".join(
            f"{count} x ({machine})" if count > 1 else machine for machine, count in kinds.items()
        )


def uses_gpus(config: Config, capacity: Capacity) -> bool:
    """Whether a run trains on GPUs: as asked for, or by itself when the cluster has one for each worker."""
    cluster = config.cluster
    least = cluster.min_workers or cluster.workers
    return cluster.gpu == "yes" or (cluster.gpu == "auto" and capacity.gpus >= least)


def threads_per_worker(config: Config, capacity: Capacity, at_once: int) -> Config:
    """With the cores shared among all workers that train on CPUs at once, unless `cluster.threads` says."""
    cluster = config.cluster
    if cluster.threads is not None or uses_gpus(config, capacity):
        return config
    threads = max(1, int(capacity.cpus) // (at_once * (cluster.workers + cluster.evaluators)))
    return config.model_copy(update={"cluster": cluster.model_copy(update={"threads": threads})})
