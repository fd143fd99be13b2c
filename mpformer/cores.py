"""How many CPU cores this process may use: its affinity, and the CPU quota of its control groups."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")


def usable_cores() -> int:
    """Cores that this process may keep busy, at least 1.

    Those of its affinity (SLURM, `taskset`, Docker's `--cpuset-cpus`), or fewer where a quota (Docker's
    `--cpus`, a limit of Kubernetes) says so; of a quota, whole cores count.
    """
    quota = cpu_quota()
    cores = _cores_of_affinity()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cores_of_affinity() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(process: Path = _PROCESS) -> float | None:
    """The smallest CPU quota, in cores, of this process's control groups (versions 1 and 2) and of those
    around them; None without one, and on systems without control groups.

    `process`: the folder of its files `cgroup` and `mountinfo`.
    """
    quotas = [quota for folder in _cpu_groups(process) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cpu_groups(process: Path) -> Iterator[Path]:
    """The folders of the control groups that limit this process's CPU time, inner ones first."""
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths: dict[str, str] = {}  # of the process in each hierarchy; version 2 names no controller
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in mounts:
        place, _, mounted = line.partition(" - ")
        root, mount_point = place.split()[3:5]
        file_system, _, options = mounted.split(" ", 2)
        if file_system == "cgroup2":
            own = paths.get("")
        elif file_system == "cgroup" and "cpu" in options.split(","):
            own = paths.get("cpu")
        else:
            own = None
        if own is not None:
            # in a container the mounted part may begin at its own group, and the path be the host's
            below = Path(own).relative_to(root) if Path(own).is_relative_to(root) else Path()
            for folder in (below, *below.parents):
                yield Path(mount_point) / folder


def _quota_of(folder: Path) -> float | None:
    """The quota of one control group in cores, None where it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:  # the group at the top has no such file
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
