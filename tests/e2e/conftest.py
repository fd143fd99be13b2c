"""A recipe that trains in a second on generated data, one Ray head for all tests, and commands on it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

RECIPE: dict[str, Any] = {
    "data": {
        "dataset": {
            "name": "tiny-scenes",
            "format": "coco_panoptic",
            **{
                split: {
                    "images": f"{split}2017",
                    "annotations": f"annotations/panoptic_{split}2017.json",
                    "panoptic_masks": f"annotations/panoptic_{split}2017",
                }
                for split in ("train", "val")
            },
        },
        "task": "panoptic",
        "loader": "inline",  # the same batches as those of `WITH_RAY`, without processes
        "augment": {"size": [64, 64], "scale": [0.5, 2.0]},
        "test_resize": {"short": 64, "long": 64},
    },
    "model": {
        "backbone": {"name": "test_resnet", "pretrained": None, "norm": "group_norm"},
        "pixel_decoder": {"channels": 16, "layers": 1, "heads": 2, "ffn": 16},
        "decoder": {"queries": 8, "layers": 2, "heads": 2, "ffn": 16},
        "pilot": {"queries": 8},
        "loss": {"points": 64},
    },
    "train": {
        "length": "12 steps",
        "batch_size": 4,
        "lr": 1e-3,
        "clip_norm": 1.0,
        "checkpoint_every": "3 steps",
        "log_every": 1,
    },
    "evaluate": {"every": "6 steps", "pictures": 0},
    "cluster": {"threads": 1},  # the same bits in a worker and in this process
}

WITH_RAY = "data.loader=ray"
"""Samples from tasks of Ray Data, as a run has them by default: where a test is about processes."""


# --- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m mpformer ...` in a process group of its own, with its own Ray or that of RAY_ADDRESS."""
    return subprocess.Popen(
        [sys.executable, "-m", "mpformer", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what a shell starts in the background, as `make test` this process, ignores Ctrl-C
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float = 400) -> Done:
    """Wait for the end of a started command."""
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out, err)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of the tests. Commands get its address in RAY_ADDRESS, as on any cluster."""

    address: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Ray Train's settings, as environment variables."""

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.address, **self.settings}

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """A process that joins the cluster."""
        return start(*arguments, **self.environment)

    def command(self, *arguments: str | Path) -> Done:
        """In this process, which joins the cluster; workers and trials are processes of the cluster."""
        from mpformer.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        warnings = logging.StreamHandler(err)  # logging's last resort, which pytest's own handlers replace
        warnings.setLevel(logging.WARNING)
        logger = logging.getLogger("mpformer")
        interrupt, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
        logger.addHandler(warnings)
        try:
            with (
                pytest.MonkeyPatch.context() as patch,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                for key, value in self.environment.items():
                    patch.setenv(key, value)
                code = main([*map(str, arguments)])
        finally:
            logger.removeHandler(warnings)
            signal.signal(signal.SIGINT, interrupt)  # Ray Train has installed its own handler
            torch.set_num_threads(threads)
        return Done(code, out.getvalue(), err.getvalue())

    def train(self, recipe: Path, *settings: str) -> Done:
        """`mpformer train` in this process, training included (Ray Train's local mode)."""
        from ray.train import ScalingConfig

        from mpformer.train import launch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_scaling", lambda config, capacity: ScalingConfig(num_workers=0))
            return self.command("train", recipe, *settings)

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray's worker processes with `title` in theirs; they are below this process, which started Ray."""
        return [p for p in psutil.Process().children(recursive=True) if title in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def started_cluster(cpus: int) -> Iterator[Any]:
    """A head node with that many logical CPUs. Only processes that are given its address join it."""
    import ray
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster as Nodes

    head = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 200 << 20}
    nodes = Nodes(initialize_head=True, head_node_args=head)
    reset_ray_address()
    try:
        yield nodes
    finally:
        ray.shutdown()  # from the process that may have joined
        nodes.shutdown()


@pytest.fixture(scope="session")
def head() -> Iterator[Cluster]:
    """One machine of eight logical CPUs for all tests; Ray is started once."""
    with started_cluster(cpus=8) as nodes:
        # this machine is no spot instance: without the watcher each run starts one process less
        yield Cluster(nodes.address, {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})


@pytest.fixture(scope="module", autouse=True)
def _left_cluster() -> Iterator[None]:
    """This process disconnects from its cluster after each module: the next one may use another."""
    yield
    import ray

    ray.shutdown()


# --- data and runs --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 5 validation scenes of 64x64."""
    from mpformer.data.synthetic import generate

    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, images={"train": 24, "val": 5}, seed=1, size=64, things=3)
    return folder


def write_recipe(folder: Path, scenes: Path, store: Path | None = None) -> Path:
    """The recipe as a file; runs go to `runs/` beside it, with a copy of that MLflow store if given."""
    if store is not None:
        (folder / "runs").mkdir()
        shutil.copy(store, folder / "runs" / "mlflow.db")
    tree = {**RECIPE, "data": {**RECIPE["data"], "root": str(scenes)}, "storage": str(folder / "runs")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def recipe(tmp_path: Path, scenes: Path, empty_store: Path) -> Path:
    return write_recipe(tmp_path, scenes, empty_store)


@pytest.fixture(scope="session")
def unbroken(head: Cluster, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe that nothing happened to, with the MLflow store that it has made."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = head.train(write_recipe(folder, scenes))
    assert done.code == 0, done.err
    (summary,) = folder.glob("runs/*/summary.json")
    return summary.parent


@pytest.fixture
def at_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_checkpoint(step, act)`: a run in this process calls `act` when the checkpoint of that step is
    complete, before the trackers and the mirror are told of it."""
    from mpformer.model.weights.checkpoints import Checkpoint
    from mpformer.train import checkpoint

    acts: dict[int, Callable[[], object]] = {}
    save = checkpoint.save

    def saved(run_dir: Path, step: int, *arguments: Any) -> Checkpoint:
        written = save(run_dir, step, *arguments)
        if step in acts:
            acts.pop(step)()
        return written

    monkeypatch.setattr(checkpoint, "save", saved)
    return acts.__setitem__
