"""One driver at a time on a run, and what it is told of its workers' failures."""

import fcntl
import json
import socket
import threading
import time

import pytest
import ray

from mpformer import atomic
from mpformer.capacity import Capacity, Node
from mpformer.config import Config, Data
from mpformer.config.model import Model
from mpformer.config.run import Tracking
from mpformer.data.synthetic import generate
from mpformer.train import launch, worker
from mpformer.types import InputError, RunError


@pytest.mark.slow
def test_a_second_driver_waits_for_an_orphan_s_end_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SECONDS_OF_AN_ORPHAN", 2.0)
    orphan = (tmp_path / ".lock").open("w")
    fcntl.flock(orphan, fcntl.LOCK_EX)
    began = time.monotonic()
    with pytest.raises(RunError, match="another process is at work"), launch.only_driver(tmp_path):
        pytest.fail("two drivers on one run")
    assert time.monotonic() - began >= 2.0

    threading.Timer(0.5, orphan.close).start()
    with launch.only_driver(tmp_path):
        other = (tmp_path / ".lock").open("w")
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_tears_no_note_of_a_failure(tmp_path, caplog):
    """An empty note would stop every later start of the run, with room on the disk or without."""
    atomic._partial(tmp_path / "failure.json").symlink_to("/dev/full")
    worker._write_failure(
        tmp_path / "failure.json", {"token": "a", "message": "step 7: the loss is not finite"}
    )
    assert not (tmp_path / "failure.json").exists()
    assert "No space left on device" in caplog.text


def test_splits_with_different_classes_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "start_ray", lambda configs: pytest.fail("Ray was started"))
    generate(tmp_path / "scenes", {"train": 1, "val": 1}, size=64)
    annotations = tmp_path / "scenes/annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"] = "sphere"
    annotations.write_text(json.dumps(content))
    config = Config(
        model=Model().without_pretrained(),
        data=Data(root=str(tmp_path / "scenes")),
        storage=str(tmp_path / "runs"),
    )
    with pytest.raises(InputError, match="class 0 is 'sphere'"):
        launch.fit(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("cluster", "nodes", "reason"),
    [
        ({"workers": 5}, [Node(8)], "at most 4"),
        (
            {"workers": 2, "gpu": "yes"},
            [Node(4), Node(16, 1)],
            "2 workers need a GPU each; the cluster has 1",
        ),
        ({"workers": 4}, [Node(2)], "4 workers x 0.5 CPU + 0.4 for data = 2.4 CPUs, but the cluster has 2"),
        # enough CPUs in all, but half a one is left on each machine, and data need a whole one
        (
            {"workers": 2, "cpus_per_worker": 3.5},
            [Node(4), Node(4)],
            "leave no machine enough for data; the cluster has 2 x (4 CPUs)",
        ),
    ],
)
def test_a_run_that_could_only_wait_is_refused_with_the_arithmetic(cluster, nodes, reason):
    config = Config.model_validate({"cluster": cluster, "train": {"batch_size": 4}})
    with pytest.raises(InputError) as refused:
        launch._scaling(config, Capacity(tuple(nodes)))
    assert reason in str(refused.value)


@pytest.mark.parametrize(("address", "told"), [("auto", "at RAY_ADDRESS=auto"), ("", "no local cluster")])
def test_ray_that_does_not_come_is_one_line(monkeypatch, address, told):
    def fail(**_):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch.ray, "init", fail)
    with pytest.raises(RunError) as refused:
        launch.start_ray()
    assert told in str(refused.value)
    assert str(refused.value).endswith(": The current node timed out during startup.")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nobody_listens_is_told_at_once(monkeypatch, scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=f"no cluster answers at RAY_ADDRESS={address}: .*refused"):
        launch.start_ray()


def test_workers_take_gpus_where_there_is_one_for_each():
    config = Config.model_validate({"cluster": {"workers": 2}, "train": {"batch_size": 4}})
    assert launch._scaling(config, Capacity((Node(4), Node(8, 1), Node(8, 1)))).use_gpu
    assert not launch._scaling(config, Capacity((Node(4), Node(8, 1)))).use_gpu


@pytest.fixture
def without_ray(monkeypatch):
    """No Ray before and after; a cluster on this machine is not joined."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["caller", "mpformer"])
def test_ctrl_c_ends_the_ray_that_was_started_here_and_no_other(tmp_path, monkeypatch, without_ray, owner):
    """With the fit of Ray Train interrupted; with real workers: `tests/e2e/test_interrupt.py`."""
    ended = []

    def interrupted(trainer):
        ended.append(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch._Trainer, "fit", interrupted)
    monkeypatch.setattr(launch._Trainer, "end_workers", lambda trainer: ended.append("workers"))
    generate(tmp_path / "scenes", {"train": 2, "val": 1}, size=64)
    config = Config(
        model=Model().without_pretrained(),
        data=Data(root=str(tmp_path / "scenes")),
        storage=str(tmp_path / "runs"),
        tracking=Tracking(mlflow=None),
    )
    for _ in range(2):  # the second one after the first has come and gone
        if owner == "caller":
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            kept = ray.put("of the caller")
        with pytest.raises(KeyboardInterrupt):
            launch.fit(config)
        assert ray.is_initialized() == (owner == "caller")
        assert ended[1:] == (["workers"] if owner == "caller" else [])
        if owner == "caller":
            assert ray.get(kept) == "of the caller"
            assert not launch.stop_ray()
            ray.shutdown()
        ended.clear()


@pytest.mark.slow
def test_a_ray_of_the_caller_is_not_ended_though_one_of_ours_was_there_before(monkeypatch, without_ray):
    launch.start_ray()
    launch.start_ray()  # there is one already: ours
    assert launch.stop_ray()
    assert not launch.stop_ray()
    launch.start_ray()
    ray.shutdown()  # by the caller
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    launch.start_ray()
    assert not launch.stop_ray()
    assert ray.is_initialized()
