"""Cores that the process may use: affinity, and CPU quotas of control groups of both versions."""

import os
import subprocess
import sys

import pytest

from mpformer import cores
from mpformer.cores import cpu_quota, usable_cores


@pytest.fixture
def machine(tmp_path):
    """Writes a process's `cgroup` and `mountinfo`, and files of control groups, below a folder."""

    def write(cgroup, mounts, groups):
        lines = [f"30 1 0:9 {root} {tmp_path}{point} rw - {rest}" for root, point, rest in mounts]
        (tmp_path / "cgroup").write_text("\n".join(cgroup) + "\n")
        (tmp_path / "mountinfo").write_text(
            "22 1 8:1 / / rw shared:1 - ext4 /dev/vda rw\n" + "\n".join(lines)
        )
        for name, text in groups.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def v1(folder, quota, period=100000):
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


V2 = [("/", "/sys", "cgroup2 cgroup2 rw,nsdelegate")]
V1 = [("/", "/cpu", "cgroup cgroup rw,cpu,cpuacct"), ("/", "/memory", "cgroup cgroup rw,memory")]


def test_quota_of_the_own_group(machine):
    process = machine(["0::/box"], V2, {"sys/box/cpu.max": "250000 100000\n"})
    assert cpu_quota(process) == 2.5


def test_quota_of_a_group_around_it(machine):
    # systemd and SLURM limit the slice or the job, not the step in it
    groups = {"sys/job/step/cpu.max": "max 100000\n", "sys/job/cpu.max": "400000 100000\n"}
    assert cpu_quota(machine(["0::/job/step"], V2, groups)) == 4


def test_the_smallest_quota_counts(machine):
    groups = {"sys/job/step/cpu.max": "150000 50000\n", "sys/job/cpu.max": "400000 100000\n"}
    assert cpu_quota(machine(["0::/job/step"], V2, groups)) == 3


def test_no_quota(machine):
    assert cpu_quota(machine(["0::/job"], V2, {"sys/job/cpu.max": "max 100000\n"})) is None
    assert cpu_quota(machine(["4:cpu,cpuacct:/job"], V1, v1("cpu/job", -1))) is None


def test_version_1(machine):
    process = machine(["5:memory:/other", "4:cpu,cpuacct:/job"], V1, v1("cpu/job", 300000))
    assert cpu_quota(process) == 3


def test_version_1_in_a_container_that_knows_the_path_of_its_host(machine):
    mounts = [("/docker/f00d", "/cpu", "cgroup cgroup rw,cpu")]
    assert cpu_quota(machine(["4:cpu:/docker/f00d"], mounts, v1("cpu", 200000))) == 2
    # the path of the host does not exist inside, the mounted part is the container's own group
    assert cpu_quota(machine(["4:cpu:/kubepods/pod1"], mounts, v1("cpu", 200000))) == 2


def test_both_versions_at_once(machine):
    mounts = [*V1, ("/", "/unified", "cgroup2 cgroup2 rw")]
    assert cpu_quota(machine(["4:cpu:/job", "0::/job"], mounts, v1("cpu/job", 600000))) == 6


def test_a_system_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 8), (16.0, 8), (8.0, 8), (3.5, 3), (1.0, 1), (0.25, 1)]
)
def test_a_quota_lowers_the_cores_of_the_affinity(monkeypatch, quota, expected):
    monkeypatch.setattr(cores, "_cores_of_affinity", lambda: 8)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert usable_cores() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_heeded():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from mpformer.cores import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_no_module_counts_the_cores_of_the_host():
    from tests.test_architecture import SOURCES, name_of

    allowed = {"cores", "cli/doctor"}  # doctor prints both
    counting = {name_of(path) for path in SOURCES if "cpu_count(" in path.read_text()}
    assert counting <= allowed
