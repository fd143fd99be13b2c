"""`RUN/summary.json`: what a finished run came to, and with what it was made."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mpformer import atomic
from mpformer.config import Config, config_hash
from mpformer.tracking.commit import git_commit
from mpformer.tracking.record import read_metrics
from mpformer.tracking.run_dir import RunDir
from mpformer.train.timing import Timers

_PACKAGES = ("torch", "ray", "timm", "mlflow", "numpy", "pycocotools")


def write_summary(
    run_dir: Path, config: Config, steps: int, timers: Timers, resources: dict[str, Any]
) -> dict[str, Any]:
    """Write the summary of a run that has reached its last step.

    The metrics come from the run's record, so a run cut off after its last step is summed up all the same.
    """
    measured = [(step, _val(values)) for step, values in read_metrics(run_dir) if _val(values)]
    first = [values for step, values in measured if step == 0]
    last = [values for step, values in measured if step == steps]
    summary = {
        "name": config.name,
        "seed": config.train.seed,
        "config_hash": config_hash(config),
        "steps": steps,
        "images_seen": steps * config.train.batch_size,
        "metrics": last[-1] if last else {},
        "untrained_metrics": first[-1] if first else {},
        **resources,
        "timers_seconds": dict(timers.total),
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], "platform": platform.platform()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }
    atomic.write_text(RunDir(run_dir).summary, json.dumps(summary, indent=1))
    return summary


def _val(values: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in values.items() if k.startswith("val/")}
