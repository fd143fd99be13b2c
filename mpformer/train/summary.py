"""`RUN/summary.json`: final metrics, versions and resources of a finished run."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mpformer import atomic
from mpformer.config import Config, config_hash
from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.evaluate.evaluation import peak_memory
from mpformer.tracking.commit import git_commit
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.record import read_metrics
from mpformer.tracking.run_dir import RunDir
from mpformer.train.group import Group
from mpformer.train.timing import Timers

_PACKAGES = ("torch", "ray", "timm", "mlflow", "numpy", "pycocotools")


def write_summary(
    run_dir: Path,
    config: Config,
    steps: int,
    timers: Timers,
    resources: dict[str, Any],
    stopped: str | None = None,
) -> dict[str, Any]:
    """Write the summary of a run that has ended after so many steps; stopped: why before its length.

    The metrics come from the run's record, so they are complete for a run interrupted after its last step.
    """
    measured = [(step, _val(values)) for step, values in read_metrics(run_dir) if _val(values)]
    first = [values for step, values in measured if step == 0]
    last = [values for step, values in measured if step == steps]
    parent = read_parent(run_dir)
    summary = {
        "name": config.name,
        "seed": config.train.seed,
        "config_hash": config_hash(config),
        "steps": steps,
        "images_seen": steps * config.train.batch_size,
        "metrics": last[-1] if last else {},
        "untrained_metrics": first[-1] if first else {},
        **(parent.summary() if parent else {}),
        **({"stopped_early": stopped} if stopped else {}),
        **resources,
        "timers_seconds": dict(timers.total),
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], "platform": platform.platform()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }
    atomic.write_text(RunDir(run_dir).summary, json.dumps(summary, indent=1))
    return summary


def measured_resources(group: Group, seconds: float, images: int, skipped: list[str]) -> dict[str, Any]:
    """What a run used, for its summary, as rank 0 measures it.

    seconds: of training; images: seen in them, over all workers; skipped: one line per bad sample.
    """
    on_gpu = group.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(group.device) if on_gpu else "cpu",
        "workers": group.world,
        "threads": torch.get_num_threads(),
        "train_seconds": seconds,
        "images_per_second": images / max(seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "peak_gpu_memory_bytes": peak_device_memory(group.device) if on_gpu else None,
        "bad_samples": skipped,
    }


def peak_device_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most, up to now: of its GPU, or on a CPU resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def forget_other_runs() -> None:
    """Free what an earlier run of this process has left, and count the peaks of its memory anew."""
    gc.collect()  # layers that are compiled or computed twice refer to themselves
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # of Linux: see proc(5)


def _val(values: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in values.items() if k.startswith((PLAIN, AVERAGED))}
