"""How many trials fit into a cluster, worked out by hand."""

import pytest

from mpformer.ablation.plan import trials_at_once
from mpformer.ablation.spec import Trial
from mpformer.capacity import Capacity, Node
from mpformer.config import Config
from mpformer.types import InputError


def machine(cpus: float, gpus: float = 0) -> Capacity:
    return Capacity((Node(cpus, gpus),))


def trials(count: int, **cluster) -> list[Trial]:
    return [Trial(f"row{i}", 0, Config.model_validate({"cluster": cluster})) for i in range(count)]


@pytest.mark.parametrize(
    ("cluster", "capacity", "expected"),
    [
        ({}, machine(2, 0), 2),  # 2 x (0.5 + 0.1) = 1.2 CPUs; a core each
        ({}, machine(1, 0), 1),
        ({"cpus_per_worker": 1}, machine(2, 0), 1),  # 2 x (1 + 0.1) = 2.2 CPUs
        ({"workers": 2}, machine(4, 0), 2),  # a core of its own for each of 2 x 2 workers
        ({"cpus_per_worker": 1}, machine(4, 0), 3),  # one is left for data
        ({"cpus_per_worker": 1.1}, machine(4, 0), 2),  # 3 x 1.1 would leave 0.7 for data
        ({"workers": 4, "cpus_per_worker": 1}, machine(64, 8), 2),  # 8 GPUs, 4 a trial
        ({"workers": 1, "cpus_per_worker": 4}, machine(16, 8), 3),  # 8 GPUs, but (16 - 1) / 4 CPUs
        ({"workers": 2, "gpu": "no"}, machine(16, 8), 8),
        ({"workers": 1, "evaluators": 1}, machine(64, 8), 4),  # a GPU for each
        ({"workers": 1, "evaluators": 1}, machine(4, 0), 2),  # a core for each
        ({}, machine(1000, 0), 10),  # never more than there are
        # each of four machines holds one worker, and data need one of them: 15 / 3.5 = 4 in all
        ({"cpus_per_worker": 3.5, "gpu": "no"}, Capacity((Node(4),) * 4), 3),
        # a head without GPUs prepares data, so that each GPU can have all of its machine's CPUs
        ({"cpus_per_worker": 16, "gpu": "yes"}, Capacity((Node(4), *[Node(16, 1)] * 3)), 3),
    ],
)
def test_trials_at_once(cluster, capacity, expected):
    assert trials_at_once(trials(10, **cluster), capacity) == expected


@pytest.mark.parametrize(
    ("cluster", "capacity", "arithmetic"),
    [
        (
            {"workers": 4},
            machine(2, 0),
            "4 workers x 0.5 CPU + 0.4 for data = 2.4 CPUs, but the cluster has 2",
        ),
        (
            {"workers": 1, "evaluators": 2, "gpu": "yes"},
            machine(16, 2),
            "1 workers and 2 evaluators need a GPU each; the cluster has 2",
        ),
        (
            {"workers": 2, "gpu": "yes"},
            machine(16, 1),
            "2 workers need a GPU each; the cluster has 1",
        ),
        (
            {"workers": 2, "cpus_per_worker": 3.5},
            Capacity((Node(4), Node(4))),
            "2 workers x 3.5 CPU leave no machine enough for data; the cluster has 2 x (4 CPUs)",
        ),
    ],
)
def test_a_study_that_cannot_fit_is_refused_with_the_arithmetic(cluster, capacity, arithmetic):
    with pytest.raises(InputError) as refused:
        trials_at_once(trials(2, **cluster), capacity)
    assert arithmetic in str(refused.value)
    assert str(refused.value).startswith("row row0 cannot run here: ")
