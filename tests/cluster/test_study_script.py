"""`study.sh` and `grow.py` with a real autoscaler, whose machines are processes of this one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

CLUSTER = Path(__file__).parents[2] / "cluster"
HEAD_TYPE = "ray.head.default"  # the only name that the provider knows the head by
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


def autoscaling(address: str) -> dict[str, Any]:
    """A cluster file as `ray up` leaves it on the head, for machines that are processes here."""
    lists = ("initialization_commands", "cluster_synced_files", "setup_commands", "head_setup_commands")
    lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    worker = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "local",
        "max_workers": 2,
        "upscaling_speed": 1,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
        "head_node_type": HEAD_TYPE,
        **{key: {} for key in ("docker", "auth", "file_mounts")},
        **{key: [] for key in lists},
    }


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of the head of a fleet that may grow to two machines of one GPU each."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    (tmp_path / "autoscaling.json").write_text(json.dumps(autoscaling(address)))
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    }
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    start += [f"--port={port}", "--include-dashboard=false"]
    short = tempfile.mkdtemp(prefix="ray-")  # a socket's path has at most 107 characters
    start += [f"--temp-dir={short}", f"--autoscaling-config={tmp_path / 'autoscaling.json'}"]
    of_head = environment | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(start, env=of_head, stdout=log, stderr=log, start_new_session=True)
    yield environment | {"RAY_ADDRESS": address}
    os.killpg(head.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    shutil.rmtree(short, ignore_errors=True)


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
        done = subprocess.run(ask, env=fleet, capture_output=True, text=True, timeout=90)
        return int(done.stdout) if done.returncode == 0 else -1

    wait_for(lambda: gpus() == 0, "the head does not start")
    done = subprocess.run(
        [CLUSTER / "study.sh", "2", "study.yaml", "data.root=/data"],
        env=fleet | {"MLFLOW": "http://mlflow:5000"},
        capture_output=True,
        text=True,
        timeout=180,
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
    assert "2 GPUs requested, 2 available" in done.stdout
    wait_for(lambda: gpus() == 0, "the GPUs are still there")
