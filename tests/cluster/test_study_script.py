"""`study.sh` and `grow.py` with a real autoscaler, whose machines are processes of this one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"

STUDY = f"""#!{sys.executable}
import json, sys, ray
ray.init(address="auto", log_to_driver=False)
print(json.dumps({{"gpus": ray.cluster_resources().get("GPU", 0), "arguments": sys.argv[1:]}}))
sys.exit(3)
"""
"""In the place of `mpformer`: says what it was given, and fails."""


GPUS = """
import ray
ray.init(address="auto", log_to_driver=False)
print(int(ray.cluster_resources().get("GPU", 0)))
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of the head of a fleet that may grow to two machines of one GPU each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    types = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {
        "cluster_name": "local",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
    }
    (tmp_path / "autoscaling.json").write_text(json.dumps(config))
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    start += [f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    start += [f"--temp-dir={tmp_path / 'ray'}", f"--autoscaling-config={tmp_path / 'autoscaling.json'}"]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    environment = {key: value for key, value in environment.items() if "OVERRIDE" not in key}
    yield environment | {"RAY_ADDRESS": address}
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(30)
    finally:
        os.killpg(head.pid, signal.SIGKILL)


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.slow
def test_a_study_gets_its_gpus_and_lets_them_go_even_when_it_fails(fleet, tmp_path):
    (tmp_path / "mpformer").write_text(STUDY)
    (tmp_path / "mpformer").chmod(0o755)

    def gpus() -> int:
        ask = [sys.executable, "-c", GPUS]
        done = subprocess.run(ask, env=fleet, capture_output=True, text=True, timeout=60)
        return int(done.stdout) if done.returncode == 0 else -1

    wait_for(lambda: gpus() == 0, (tmp_path / "head.log").read_text())
    done = subprocess.run(
        [CLUSTER / "study.sh", "2", "study.yaml", "data.root=/data"],
        env=fleet | {"MLFLOW": "http://mlflow:5000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert told == {
        "gpus": 2,
        "arguments": [
            *("ablate", "study.yaml", "data.root=/data"),
            *("cluster.gpu=yes", "tracking.mlflow=http://mlflow:5000"),
        ],
    }
    assert "2 GPUs asked for, 2 there" in done.stdout
    wait_for(lambda: gpus() == 0, "the GPUs are still there")
