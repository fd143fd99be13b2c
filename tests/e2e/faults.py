"""What is done to a run from outside, and what must hold of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from mpformer.config import load_config, run_name
from mpformer.model.weights import checkpoints
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import read_points


def run_dir_of(recipe: Path, *settings: str) -> Path:
    config = load_config(recipe, list(settings))
    return Path(config.storage) / run_name(config)


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240, pause: float = 0.05
) -> None:
    """Until it holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(pause)


@contextlib.contextmanager
def held(process: subprocess.Popen[str]) -> Iterator[None]:
    """While the body runs, the one training worker below the driver does nothing."""
    (worker,) = training_workers(process.pid)
    worker.suspend()
    yield
    worker.resume()


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """A condition: the newest checkpoint is of that step or a later one."""

    def holds() -> bool:
        found = checkpoints.complete(run_dir)
        return bool(found) and found[-1].name >= f"step-{step:08d}"

    return holds


def training_workers(driver: int) -> list[psutil.Process]:
    """The processes that train, below a driver."""
    return [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in title(p)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def seconds_until_step_goes_on(
    run_dir: Path, process: subprocess.Popen[str], since: float, before: Path | None = None
) -> float:
    """From `since` (time.time) until the first point that a later start of the run has written; `before`: the
    folder of the starts before, if that is another one."""
    known = len(list(((before or run_dir) / "metrics").glob("*.jsonl")))

    def goes_on() -> bool:
        parts = sorted((run_dir / "metrics").glob("*.jsonl"))
        return len(parts) > known and parts[-1].read_text().count("\n") > 1

    wait_for(goes_on, process)
    return time.time() - since


def note(fault: str, **figures: object) -> None:
    """A line for the table of faults, to the file that MPFORMER_FAULTS names."""
    if path := os.environ.get("MPFORMER_FAULTS"):
        with open(path, "a") as file:
            file.write(json.dumps({"fault": fault, **figures}) + "\n")


TIMED = ("time/", "speed/")
"""Keys of what a clock has measured."""


def values(run_dir: Path) -> dict[tuple[int, str], float]:
    """The record without what a clock has measured."""
    return {
        (p.step, key): value
        for p in read_points(run_dir)
        for key, value in p.values.items()
        if not key.startswith(TIMED)
    }


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.complete(run_dir)[-1] / "model.safetensors")


def difference(run_dir: Path, unbroken: Path) -> float:
    """Largest absolute difference of the final weights."""
    a, b = weights(run_dir), weights(unbroken)
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def assert_as_unbroken(run_dir: Path, unbroken: Path, repeated: bool = False) -> None:
    """Same steps, same points with the same values, bit-equal weights; MLflow has each point once.

    repeated: some steps that MLflow knew were gone through again. It then also has what a clock measured of
    them the first time and not the second, such as the checkpoint before them; nothing can be taken from it.
    """
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12
    assert values(run_dir) == values(unbroken)
    assert difference(run_dir, unbroken) == 0
    assert_mirrored(run_dir, repeated)


def assert_mirrored(run_dir: Path, repeated: bool = False) -> None:
    link = json.loads((run_dir / "mlflow.json").read_text())
    store = client(link["uri"])
    run = store.get_run(link["run_id"])
    sent = [(m.step, key) for key in run.data.metrics for m in store.get_metric_history(link["run_id"], key)]
    expected = {(p.step, key) for p in read_points(run_dir) for key in p.values}
    assert run.info.status == "FINISHED"
    assert len(sent) == len(set(sent))
    surplus = {(step, key) for step, key in set(sent) - expected if not (repeated and key.startswith(TIMED))}
    assert not surplus
    assert expected <= set(sent)
