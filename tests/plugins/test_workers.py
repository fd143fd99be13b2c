"""Plug-ins reach the workers: on this machine by its folder, on a cluster with the job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpformer import plugin

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys
sys.path.remove("")  # as the console script, whose first folder is that of the script
import os
from mpformer.config import Config
from mpformer.train.launch import start_ray
import ray

own = [{"kind": "steps:Slow"}, {"kind": "schedules.linear:falling"}]
configs = [Config.model_validate({"train": {"schedule": schedule}}) for schedule in own]
start_ray(configs)
if "RAY_ADDRESS" in os.environ:  # the machines of a cluster do not have this folder
    os.mkdir("elsewhere")
    for name in ("steps.py", "schedules"):
        os.rename(name, f"elsewhere/{name}")

@ray.remote(num_cpus=0.1)
def factors():
    os.chdir("/")
    from mpformer.train.optim import schedule
    made = [schedule(config.train.schedule) for config in configs]
    return [one(0.25) for one in made], [sys.modules[n].__file__ for n in ("steps", "schedules.linear")]

print(*ray.get(factors.remote()), sep="\\n")
"""


def start(folder, **environment):
    (folder / "schedules").mkdir()
    (folder / "schedules" / "__init__.py").touch()
    (folder / "schedules" / "shared.py").write_text("LAST = 0.2\n")
    (folder / "schedules" / "linear.py").write_text(
        "from schedules.shared import LAST\n\ndef falling(done):\n    return 1 - (1 - LAST) * done\n"
    )
    (folder / "steps.py").write_text("class Slow:\n    def __call__(self, done):\n        return done / 2\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", plugin.FOLDER_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    factors, files = done.stdout.strip().splitlines()[-2:]
    assert factors == "[0.125, 0.8]"
    return files


@pytest.mark.slow
def test_workers_on_this_machine_import_from_the_folder_of_the_command(tmp_path):
    assert str(tmp_path / "steps.py") in start(tmp_path)


@pytest.mark.slow
def test_a_cluster_is_sent_modules_and_whole_packages(tmp_path):
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    reset_ray_address()
    try:
        files = start(tmp_path, RAY_ADDRESS=nodes.address)
    finally:
        nodes.shutdown()
    assert str(tmp_path) not in files
    assert files.count("py_modules_files") == 2


def test_only_what_lies_in_the_folder_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "one.py").touch()
    for package in ("two", "yaml"):  # the latter does not stand in for the installed one
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    names = ["one:A", "two.inner.most:B", "two:C", "yaml:D", "math:sqrt", "nowhere:E"]
    assert plugin.modules_to_send(names) == [str(tmp_path / "one.py"), str(tmp_path / "two")]
