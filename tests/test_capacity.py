"""What fits into a cluster: plan, launch and data pipeline agree, and with a simulation of placement."""

from unittest import mock

import pytest
import ray
from hypothesis import example, given
from hypothesis import strategies as st

from mpformer.ablation.plan import trials_at_once
from mpformer.ablation.spec import Trial
from mpformer.capacity import Capacity, Node, with_shared_cores
from mpformer.config import Config
from mpformer.data.pipeline import _task_options
from mpformer.train.launch import _scaling
from mpformer.types import InputError

NODES = st.lists(
    st.builds(Node, st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64]), st.sampled_from([0, 0, 1, 2, 8])),
    min_size=1,
    max_size=4,
)
CPUS = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 0.9, 1, 1.5, 1.9, 2, 3, 3.5, 4, 7, 8, 16])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    workers = draw(st.integers(1, 10))
    return Config.model_validate(
        {
            "cluster": {
                "workers": workers,
                "min_workers": draw(st.none() | st.integers(1, workers)),
                "evaluators": draw(st.sampled_from([0, 0, 1, 2])),
                "cpus_per_worker": draw(CPUS),
                "gpu": draw(st.sampled_from(["auto", "yes", "no"])),
            },
            "train": {"batch_size": draw(st.sampled_from([1, 4, 16]))},
        }
    )


def reason(function, *arguments) -> str | None:
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return None


def room(nodes: list[Node], each: float, on_gpu: bool, data: float = 0) -> int:
    """Members that can be placed one after the other beside a data task on the best machine for it.

    Counted in thousandths of a CPU: no rounding.
    """
    most = 0
    for chosen in range(len(nodes)):
        count = 0
        for number, node in enumerate(nodes):
            cpus = round(1000 * node.cpus) - (round(1000 * data) if number == chosen else 0)
            if cpus < 0:
                count = -(10**9)  # no room for the data task
            gpus = node.gpus
            while cpus >= round(1000 * each) and (gpus >= 1 or not on_gpu):
                cpus, gpus, count = cpus - round(1000 * each), gpus - 1, count + 1
        most = max(most, count)
    return most


def fits(nodes: list[Node], config: Config, runs: int) -> bool:
    """Whether so many runs can be placed and leave CPUs to their data."""
    cluster, total = config.cluster, sum(node.cpus for node in nodes)
    least = cluster.min_workers or cluster.workers
    on_gpu = cluster.gpu == "yes" or (cluster.gpu == "auto" and sum(node.gpus for node in nodes) >= least)
    workers = cluster.workers
    if runs == 1 and least < workers:  # as many as Ray Train finds room for
        workers = max(least, min(workers, room(nodes, cluster.cpus_per_worker, on_gpu)))
    members = runs * (workers + cluster.evaluators)
    plenty = total >= 4 * workers
    left = 1000 * total - members * round(1000 * cluster.cpus_per_worker)
    return (
        cluster.workers <= config.train.batch_size
        and left >= (1000 if plenty else 100 * workers * runs)
        and room(nodes, cluster.cpus_per_worker, on_gpu, 1 if plenty else 0.1) >= members
    )


TWO_OF_THREE_QUARTERS = Config.model_validate({"cluster": {"workers": 2, "cpus_per_worker": 0.75}})
ELASTIC_OVER_ALL = Config.model_validate({"cluster": {"workers": 4, "min_workers": 1}})
ALL_BUT_ONE = Config.model_validate({"cluster": {"cpus_per_worker": 7}})


@given(NODES, configs())
@example([Node(2)], TWO_OF_THREE_QUARTERS)  # the plan accepted it, every launch refused
@example([Node(2)], ELASTIC_OVER_ALL)  # Ray would give all CPUs to workers
@example([Node(8)], ALL_BUT_ONE)  # fits, in a study too
def test_plan_and_launch_agree_and_are_right(nodes, config):
    capacity = Capacity(tuple(nodes))
    launch = reason(_scaling, config, capacity)
    plan = reason(trials_at_once, [Trial("row", 0, config)], capacity)
    assert plan == (None if launch is None else f"row row cannot run here: {launch}")
    assert (launch is None) == fits(nodes, config, runs=1)


@given(NODES, configs())
def test_the_runs_of_a_study_fit_together(nodes, config):
    capacity = Capacity(tuple(nodes))
    if reason(capacity.check_fits, config) is None:
        at_once = trials_at_once([Trial("row", seed, config) for seed in range(100)], capacity)
        assert at_once == 1 or fits(nodes, config, runs=at_once)


@given(NODES, st.lists(configs(), min_size=1, max_size=4))
def test_a_study_is_refused_where_launch_would_refuse_one_of_its_runs(nodes, rows):
    capacity = Capacity(tuple(nodes))
    trials = [Trial(f"row{number}", 0, config) for number, config in enumerate(rows)]
    refused = any(reason(_scaling, config, capacity) for config in rows)
    assert (reason(trials_at_once, trials, capacity) is not None) == refused


@given(NODES, configs())
def test_the_data_tasks_of_a_run_that_is_accepted_can_start(nodes, config):
    capacity, cluster = Capacity(tuple(nodes)), config.cluster
    if cluster.min_workers is None and reason(_scaling, config, capacity) is None:
        listed = [{"Alive": True, "Resources": {"CPU": node.cpus, "GPU": node.gpus}} for node in nodes]
        with mock.patch.object(ray, "nodes", return_value=listed):
            claim = _task_options(cluster.workers, blocks=8)["num_cpus"]
        on_gpu = capacity.uses_gpus(cluster)
        members = cluster.workers + cluster.evaluators
        assert room(nodes, cluster.cpus_per_worker, on_gpu, claim) >= members


def test_dead_machines_do_not_count():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}},
    ]
    assert Capacity.of(nodes) == Capacity((Node(4), Node(16, 2)))
    assert str(Capacity.of([*nodes, nodes[0]])) == "2 x (4 CPUs), 16 CPUs + 2 GPUs"


@pytest.mark.parametrize(
    ("cluster", "node", "threads"),
    [
        ({"workers": 2}, Node(16), 4),
        ({"workers": 2, "evaluators": 2}, Node(16), 2),
        ({"workers": 20}, Node(16), 1),
        ({"workers": 2}, Node(16, 2), None),  # on GPUs
        ({"workers": 2, "threads": 3}, Node(16), 3),
    ],
)
def test_runs_at_once_share_the_cores(cluster, node, threads):
    config = Config.model_validate({"cluster": cluster})
    assert with_shared_cores(config, Capacity((node,)), at_once=2).cluster.threads == threads


@pytest.mark.parametrize(
    ("nodes", "cluster", "alone"),
    [
        ([Node(8)], {}, True),
        ([Node(8, 1)], {"gpu": "yes"}, True),
        ([Node(8), Node(8)], {}, False),
        ([Node(8)], {"workers": 2}, False),
        ([Node(8)], {"workers": 2, "min_workers": 1}, False),
        ([Node(8)], {"evaluators": 1}, False),
    ],
)
def test_a_trial_is_its_own_worker_where_that_is_the_same(nodes, cluster, alone):
    assert Capacity(tuple(nodes)).holds_in_one_process(Config.model_validate({"cluster": cluster})) == alone


def test_a_worker_claims_what_the_settings_say():
    one = Config.model_validate({"cluster": {"cpus_per_worker": 1.5}}).cluster
    assert Capacity((Node(8),)).claim_of_worker(one) == {"CPU": 1.5}
    assert Capacity((Node(8, 1),)).claim_of_worker(one) == {"CPU": 1.5, "GPU": 1}
