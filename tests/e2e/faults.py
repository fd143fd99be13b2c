"""What is done to a run from outside, and what must hold of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpformer.config import load_config, run_name
from mpformer.cores import usable_cores
from mpformer.model.weights.checkpoints import complete
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import read_points
from tests.e2e.conftest import Done, finish


def run_dir_of(recipe: Path, *settings: str) -> Path:
    config = load_config(recipe, list(settings))
    return Path(config.storage) / run_name(config)


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 400
) -> None:
    """Until it holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """A thread calls `act` as soon as the condition holds, while the body runs in this one.

    What it raises is raised after the body; so is an error if the body ends before the condition holds.
    """
    over = threading.Event()

    def watch() -> None:
        while not condition():
            assert not over.is_set(), "the body ended before the condition held"
            time.sleep(0.02)
        act()

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
        watched.result()


def interrupted(process: subprocess.Popen[str], ready: Callable[[], bool]) -> tuple[Done, float]:
    """Ctrl-C of a terminal, which reaches all processes of the group; the seconds until the end.

    On a machine with more to do than it has cores they count as that much less.
    """
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=120)
        seconds = time.monotonic() - began
        done = finish(process, timeout=120)  # once all of the group have closed the pipe
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would run on beside all other tests
        raise
    return done, seconds / max(1.0, os.getloadavg()[0] / usable_cores())


def states(folder: Path) -> set[str]:
    """Of all runs in the MLflow store of a storage folder."""
    store = client(f"sqlite:///{folder / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in store.search_experiments()]
    return {run.info.status for run in store.search_runs(ids)}


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """A condition: the newest checkpoint is of that step or a later one."""

    def holds() -> bool:
        found = complete(run_dir)
        return bool(found) and found[-1].name >= f"step-{step:08d}"

    return holds


def starts(run_dir: Path) -> list[int]:
    """The step that each start of the run went on from, in their order."""
    parts = sorted((run_dir / "metrics").glob("*.jsonl"))
    return [json.loads(part.read_text().splitlines()[0])["start_step"] for part in parts]


def seconds_until_step_goes_on(run_dir: Path, since: float) -> float:
    """From `since` (time.time) until the first point that the last start of the run has written."""
    part = sorted((run_dir / "metrics").glob("*.jsonl"))[-1]
    return json.loads(part.read_text().splitlines()[1])["time"] / 1000 - since


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
    return load_file(complete(run_dir)[-1] / "model.safetensors")


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
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, unbroken))
    assert mine["steps"] == theirs["steps"]
    assert values(run_dir) == values(unbroken)
    assert difference(run_dir, unbroken) == 0
    assert_mirrored(run_dir, repeated)


def assert_mirrored(run_dir: Path, repeated: bool = False) -> None:
    """MLflow has the run as finished, and each point of its record once."""
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
