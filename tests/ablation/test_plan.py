"""How many trials fit into a cluster, worked out by hand."""

import pytest

from mpformer.ablation.plan import Capacity, threads_per_worker, trials_at_once
from mpformer.ablation.spec import Trial
from mpformer.config import Config
from mpformer.types import InputError


def trials(count: int, **cluster) -> list[Trial]:
    return [Trial(f"row{i}", 0, Config.model_validate({"cluster": cluster})) for i in range(count)]


@pytest.mark.parametrize(
    ("cluster", "capacity", "expected"),
    [
        ({}, Capacity(2, 0), 2),  # 2 x (0.51 + 0.1) = 1.22 CPUs; a core each
        ({}, Capacity(1, 0), 1),
        ({"cpus_per_worker": 1}, Capacity(2, 0), 1),  # 2 x (1.01 + 0.1) = 2.22 CPUs
        ({"workers": 2}, Capacity(4, 0), 2),  # a core of its own for each of 2 x 2 workers
        ({"cpus_per_worker": 1}, Capacity(4, 0), 2),  # 3 x 1.01 would leave 0.97 for data
        ({"workers": 4, "cpus_per_worker": 1}, Capacity(64, 8), 2),  # 8 GPUs, 4 a trial
        ({"workers": 1, "cpus_per_worker": 4}, Capacity(16, 8), 3),  # 8 GPUs, but (16 - 1) / 4.01 CPUs
        ({"workers": 2, "gpu": "no"}, Capacity(16, 8), 8),
        ({"workers": 1, "evaluators": 1}, Capacity(64, 8), 4),  # a GPU for each
        ({"workers": 1, "evaluators": 1}, Capacity(4, 0), 2),  # a core for each
        ({}, Capacity(1000, 0), 10),  # never more than there are
    ],
)
def test_trials_at_once(cluster, capacity, expected):
    assert trials_at_once(trials(10, **cluster), capacity) == expected


@pytest.mark.parametrize(
    ("cluster", "capacity", "arithmetic"),
    [
        (
            {"workers": 4},
            Capacity(2, 0),
            "4 workers x 0.5 CPU + 0.01 for their driver = 2.01 CPUs, some more for data",
        ),
        (
            {"workers": 1, "evaluators": 2, "gpu": "yes"},
            Capacity(16, 2),
            "(1 workers + 2 evaluators) x 0.5 CPU + 0.01 for their driver = 1.51 CPUs, some more for data, "
            "and a GPU per worker = 3",
        ),
        (
            {"workers": 2, "gpu": "yes"},
            Capacity(16, 1),
            "a GPU per worker = 2; the cluster has 16 CPUs and 1 GPUs",
        ),
    ],
)
def test_a_study_that_cannot_fit_is_refused_with_the_arithmetic(cluster, capacity, arithmetic):
    with pytest.raises(InputError) as refused:
        trials_at_once(trials(2, **cluster), capacity)
    assert arithmetic in str(refused.value)
    assert "row0" in str(refused.value)


def test_cores_are_shared_among_the_workers_that_train_at_once():
    [trial] = trials(1, workers=2)
    assert threads_per_worker(trial.config, Capacity(16, 0), at_once=2).cluster.threads == 4
    assert threads_per_worker(trial.config, Capacity(16, 2), at_once=1).cluster.threads is None  # GPUs
    [said] = trials(1, threads=3)
    assert threads_per_worker(said.config, Capacity(16, 0), at_once=2).cluster.threads == 3
