"""Overhead of a fleet: checkpoints, a second node, interruptions; and the accuracy of the makespan model.

python benchmarks/fleet.py checkpoint [RECIPE]     time and size of a checkpoint, overhead, best intervals
python benchmarks/fleet.py nodes [LAYOUT ...]      two local Ray nodes compared with one; see LAYOUTS
python benchmarks/fleet.py makespan                a study with real interruptions compared with the model

The last two start Ray nodes on this machine with separate cores (Linux), without a network between them.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from mpformer.ablation.makespan import Interruptions, best_interval, makespan
from mpformer.config import load_config, run_name
from mpformer.tracking.record import Point, read_entries, read_points, record_files
from mpformer.tracking.run_dir import RunDir

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "experiments" / "recipes"
TINY = RECIPES / "synthetic-panoptic-tiny.yaml"
REPEATS = 5

# --- checkpoints ----------------------------------------------------------------------------------

EPOCH_HOURS = 50.8 / 36
"""Hours of an epoch, the default interval, of MP-Former R50 on COCO instances: its Table 6, 4 A100."""
RESTART_HOURS = 0.1
"""Assumed: start and set-up of a new cloud machine, and start of the processes."""


def time_checkpoint(recipe: Path) -> None:
    import torch

    from mpformer.model.architecture import build_model
    from mpformer.model.weights import checkpoints
    from mpformer.train import checkpoint
    from mpformer.train.optim import build_optimizer

    config = load_config(recipe, ["model.backbone.pretrained=null"])
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    for _ in range(REPEATS):
        with timed("build"):
            model = build_model(config.model, 80)
        optimizer = build_optimizer(model, config.train)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            state = {"train_seconds": 0, "skipped": []}
            with timed("write"):
                saved = checkpoint.save(Path(folder), 1, model, optimizer, config, state)
            with timed("check"):
                found, _ = checkpoints.latest(Path(folder))
            with timed("restore"):
                checkpoint.restore(found, model, optimizer)
            size = sum(file.stat().st_size for file in saved.path.iterdir())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{recipe.stem}: {size / 1e6:.0f} MB; seconds, median of {REPEATS} (least to most):")
    for name, values in seconds.items():
        print(f"  {name:8} {median[name]:.2f} ({min(values):.2f} to {max(values):.2f})")
    print(f"  share of an epoch of {EPOCH_HOURS:.2f} h: {100 * median['write'] / 3600 / EPOCH_HOURS:.3f} %")
    _shares(median["write"] / 3600)


def _shares(checkpoint_hours: float) -> None:
    """Print the effect of interruptions on training time; writing, lost work and restarts in per cent."""
    print(
        "| interruptions/h | interval | time | writing % | lost % | restarting % |\n|---|---|---|---|---|---|"
    )
    for rate in (0.01, 0.05, 0.2, 1.0):
        best = best_interval(rate, checkpoint_hours)
        for name, interval in (
            ("1 epoch", EPOCH_HOURS),
            ("30 min", 0.5),
            (f"best: {best * 60:.1f} min", best),
        ):
            spent = Interruptions(rate, interval, checkpoint_hours, RESTART_HOURS).spent(100)
            shares = (spent.checkpoints, spent.lost, spent.restarting)
            figures = " | ".join(f"{100 * share / spent.total:.2f}" for share in shares)
            print(f"| {rate:g} | {name} | x {spent.factor:.3f} | {figures} |")


# --- local nodes ----------------------------------------------------------------------------------

NODE_CPUS = 4
"""Logical CPUs of a node, independent of its cores: enough for one training worker, too few for two, and more
than one for data tasks."""
CPUS_PER_WORKER = 2.5


@contextmanager
def local_nodes(cores_of_node: Sequence[Sequence[int]], cpus: int = NODE_CPUS) -> Iterator[dict[str, str]]:
    """Ray nodes restricted to their cores, and a head without work; yields the environment to join them."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 300 << 20}
    mine = os.sched_getaffinity(0)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small}
    )
    try:
        for cores in cores_of_node:
            os.sched_setaffinity(0, cores)  # inherited by processes that this thread starts
            cluster.add_node(num_cpus=cpus, **small)
        os.sched_setaffinity(0, mine)
        yield {
            **os.environ,
            "RAY_ADDRESS": cluster.address,
            "PYTHONPATH": str(ROOT),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    finally:
        cluster.shutdown()


def scenes(folder: Path) -> Path:
    """Generate scenes for the tiny recipe."""
    from mpformer.data.synthetic import generate

    generate(folder, images={"train": 200, "val": 16}, seed=1, size=128, things=4)
    return folder


COMMON = {
    "tracking.mlflow": None,
    "train.checkpoint_every": "20 steps",
    "evaluate.every": None,
    "evaluate.at_start": False,
    "evaluate.pictures": 0,
    "cluster.gpu": "no",
}


@dataclass(frozen=True)
class Layout:
    """Nodes and workers of a measurement."""

    cores: tuple[tuple[int, ...], ...]
    """By node."""
    workers: int = 1
    threads: int = 1
    batch: int = 8
    cpus: int = NODE_CPUS


LAYOUTS = {
    "one": Layout(((0,),)),
    "half": Layout(((0,),), batch=4),
    "two": Layout(((0,), (1,)), workers=2),
    "threads": Layout(((0, 1),), threads=2),
    "workers": Layout(((0, 1),), workers=2, cpus=2 * NODE_CPUS),
}
NODE_STEPS = 60
WARM_UP = 20


def time_nodes(names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = scenes(Path(folder) / "scenes")
        for name in names:
            print(
                json.dumps({"layout": name, **_train(LAYOUTS[name], root, Path(folder) / name)}), flush=True
            )


def _train(layout: Layout, root: Path, storage: Path) -> dict[str, Any]:
    """Milliseconds per step by part, after `WARM_UP` steps, on rank 0; seconds of the command by part."""
    settings = {
        **COMMON,
        "data.root": str(root),
        "storage": str(storage),
        "train.length": f"{NODE_STEPS} steps",
        "train.log_every": WARM_UP,
        "train.batch_size": layout.batch,
        "cluster.workers": layout.workers,
        "cluster.cpus_per_worker": CPUS_PER_WORKER,
        "cluster.threads": layout.threads,
    }
    arguments = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    with local_nodes(layout.cores, layout.cpus) as environment:
        began = time.time()
        command = [sys.executable, "-m", "mpformer", "train", str(TINY), *arguments]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall = time.time() - began
    run_dir = storage / run_name(load_config(TINY, arguments))
    summary = json.loads(RunDir(run_dir).summary.read_text())
    points = [p.values for p in read_points(run_dir) if p.step > WARM_UP and "train/loss" in p.values]
    speed = statistics.mean(values["speed/images_per_second"] for values in points)
    spent = {key: statistics.mean(v[key] for v in points) for key in points[0] if key.startswith("time/")}
    pauses = {"time/evaluate", "time/checkpoint", "time/restore"}
    step = layout.batch / speed
    parts_of_step = {key[5:]: round(1000 * value) for key, value in spent.items() if key not in pauses}
    parts_of_step["rest"] = round(1000 * step) - sum(parts_of_step.values())
    timers = summary["timers_seconds"]
    pausing = timers["evaluate"] + timers["checkpoint"]
    return {
        "images_per_second": round(speed, 2),
        "step_ms": round(1000 * step),
        **parts_of_step,
        "command_s": round(wall, 1),
        "training_s": round(summary["train_seconds"], 1),
        "evaluation_s": round(timers["evaluate"], 1),
        "checkpoints_s": round(timers["checkpoint"], 2),
        "start_and_end_s": round(wall - summary["train_seconds"] - pausing, 1),
    }


# --- the makespan model compared with a real study --------------------------------------------------

RUNS = 6
RUN_STEPS = 240
EVERY = 20
INTERRUPTIONS_PER_HOUR = 36.0
"""Interruptions of each node: one in 100 seconds, about two for three runs."""
DRAWS = 2000


@dataclass(frozen=True)
class Seconds:
    """Times measured beforehand on the same nodes, in seconds."""

    first_start: float
    """From the command until the first run trains."""
    next_start: float
    """From the end of a run until the next one trains."""
    step: float
    checkpoint: float
    end: float
    """From a run's last step until its summary is written: evaluation and the last checkpoint."""
    restart: float
    """From the kill until the run trains again."""


def check_makespan() -> None:
    with tempfile.TemporaryDirectory() as folder, local_nodes(((0,), (1,))) as environment:
        root = scenes(Path(folder) / "scenes")
        calibration = Study(Path(folder) / "calibration", root, range(100, 103))
        kills = calibration.run(environment, _one_kill(calibration))
        costs = calibration.seconds(kills[0][1])
        print({key: round(value, 2) for key, value in vars(costs).items()}, flush=True)

        study = Study(Path(folder) / "study", root, range(RUNS))
        drawn = _draw(np.random.default_rng(0))
        kills = study.run(environment, _whenever(drawn))
        measured = study.end - study.began
        lives = [len(record_files(run)) for run in study.runs]
    at = [[seconds for node, seconds in kills if node == which] for which in (0, 1)]
    print("interruptions, seconds after the command:", [[round(s, 1) for s in node] for node in at])
    print("starts of the runs:", lives)
    plays = [play(_draw(np.random.default_rng(seed)), costs) for seed in range(1, DRAWS + 1)]
    low, high = np.quantile(plays, [0.05, 0.95])
    for what, seconds in (
        ("measured", measured),
        ("model, expected", expected(costs, INTERRUPTIONS_PER_HOUR)),
        ("model, without interruptions", expected(costs, 0)),
        ("simulated with the actual interruptions", play(at, costs)),
        ("played through with drawn ones, mean", float(np.mean(plays))),
    ):
        print(f"{what}: {seconds:.1f} s ({100 * (seconds / measured - 1):+.1f} %)")
    print(f"90 % of draws: {low:.0f} to {high:.0f} s")


class Study:
    """A study of several seeds of the tiny recipe, run by `mpformer ablate` on two nodes."""

    def __init__(self, folder: Path, root: Path, seeds: Sequence[int]) -> None:
        self.file, self.began = folder / "study.yaml", 0.0
        settings = {
            **COMMON,
            "data.root": str(root),
            "storage": str(folder / "runs"),
            "train.length": f"{RUN_STEPS} steps",
            "train.batch_size": 4,
            "train.checkpoint_every": f"{EVERY} steps",
            "train.log_every": 1,
            "cluster.cpus_per_worker": CPUS_PER_WORKER,
            "cluster.threads": 1,
            "cluster.max_failures": -1,
        }
        folder.mkdir()
        study = {
            "title": "Interrupted runs",
            "base": str(TINY),
            "settings": settings,
            "columns": {"val/PQ": {"title": "PQ"}},
            "baseline": "row",
            "rows": {"row": {}},
            "seeds": list(seeds),
        }
        self.file.write_text(yaml.safe_dump(study))

    @property
    def runs(self) -> list[Path]:
        return sorted(self.file.parent.glob("runs/study/row-*"))

    @property
    def end(self) -> float:
        """Time at which the last run finished."""
        return max(RunDir(run).summary.stat().st_mtime for run in self.runs)

    def run(self, environment: dict[str, str], due: Callable[[float, int], bool]) -> list[tuple[int, float]]:
        """Run the study and kill (node, seconds) the worker of a node whenever `due(seconds, node)`."""
        kills = []
        self.began = time.time()
        command = [sys.executable, "-m", "mpformer", "ablate", str(self.file)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            for node in (0, 1):
                if due(time.time() - self.began, node) and (worker := _worker_of(node)):
                    worker.kill()
                    kills.append((node, time.time() - self.began))
            time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
        return kills

    def seconds(self, kill: float) -> Seconds:
        """Times from the records, which have one per step; `kill`: seconds until the only kill."""
        lives = {run: [_life(part) for part in record_files(run)] for run in self.runs}
        broken = next(run for run in self.runs if len(lives[run]) == 2)
        unbroken = [run for run in self.runs if run != broken]
        plain, after_checkpoint, ends = [], [], []
        for run in unbroken:
            points = [point for point in lives[run][0] if "train/loss" in point.values]
            for before, after in itertools.pairwise(points):
                kind = plain if before.step % EVERY else after_checkpoint
                kind.append((after.time - before.time) / 1000)
            ends.append(RunDir(run).summary.stat().st_mtime - points[-1].time / 1000)
        step = statistics.mean(plain)
        starts = sorted(lives[run][0][0].time / 1000 - step for run in self.runs)
        first_end = min(RunDir(run).summary.stat().st_mtime for run in self.runs)
        return Seconds(
            first_start=statistics.mean(starts[:2]) - self.began,
            next_start=starts[2] - first_end,
            step=step,
            checkpoint=statistics.mean(after_checkpoint) - step,
            end=statistics.mean(ends),
            restart=lives[broken][1][0].time / 1000 - step - self.began - kill,
        )


def _life(part: Path) -> list[Point]:
    return [entry for entry in read_entries(part)[0] if isinstance(entry, Point)]


def _worker_of(node: int) -> psutil.Process | None:
    """The training worker on a node, identified by its core; None if there is none."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()) and process.cpu_affinity() == [node]:
                return process
        except psutil.Error:  # ended in the meantime
            continue
    return None


def _one_kill(study: Study) -> Callable[[float, int], bool]:
    """Kill once, on node 0, after half of its first run."""
    done = False

    def due(_seconds: float, node: int) -> bool:
        nonlocal done
        if done or node != 0 or len(study.runs) < 2:
            return False
        done = all((p := read_points(run)) and p[-1].step > RUN_STEPS // 2 for run in study.runs[:2])
        return done

    return due


def _whenever(drawn: list[list[float]]) -> Callable[[float, int], bool]:
    """Kill at the drawn times of each node."""

    def due(seconds: float, node: int) -> bool:
        if seconds < drawn[node][0]:
            return False
        drawn[node].pop(0)
        return True

    return due


def _draw(random: np.random.Generator) -> list[list[float]]:
    """Times of the interruptions of both nodes in seconds, from a Poisson process."""
    gaps = random.exponential(3600 / INTERRUPTIONS_PER_HOUR, size=(2, 100))
    return [list(node) for node in gaps.cumsum(1)]


def expected(costs: Seconds, per_hour: float) -> float:
    """Prediction of the model of `--plan`, with the start-up time added to each run."""
    spot = Interruptions(per_hour, EVERY * costs.step / 3600, costs.checkpoint / 3600, costs.restart / 3600)
    training = RUN_STEPS * costs.step + costs.end - costs.checkpoint
    run = 3600 * spot.spent(training / 3600).total
    return costs.first_start - costs.next_start + makespan([costs.next_start + run] * RUNS, [1] * RUNS, 2)


def play(kills: Sequence[Sequence[float]], costs: Seconds) -> float:
    """Seconds until all runs finish if the nodes are interrupted at these times."""
    free = [costs.first_start - costs.next_start] * 2
    for _ in range(RUNS):
        node = free.index(min(free))
        now = _started(free[node], costs.next_start, kills[node], costs.restart)
        for segment in range(RUN_STEPS // EVERY):
            last = segment == RUN_STEPS // EVERY - 1
            length = EVERY * costs.step + (costs.end if last else costs.checkpoint)
            now = _trained(now, length, kills[node], costs.restart)
        free[node] = now
    return max(free)


def _started(now: float, length: float, kills: Sequence[float], restart: float) -> float:
    """Time at which a run trains whose start takes `length`; an interruption starts a restart instead."""
    for kill in kills:
        if now <= kill < now + length:
            now, length = kill, restart
    return now + length


def _trained(now: float, length: float, kills: Sequence[float], restart: float) -> float:
    """Time at which a segment of `length` and its checkpoint are done; an interruption discards it."""
    for kill in kills:
        if now <= kill < now + length:
            now = _started(kill, restart, [later for later in kills if later > kill], restart)
    return now + length


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "checkpoint":
        time_checkpoint(Path(rest[0]) if rest else RECIPES / "coco-instance-r50.yaml")
    elif mode == "nodes":
        time_nodes(rest or list(LAYOUTS))
    elif mode == "makespan":
        check_makespan()
    else:
        sys.exit(__doc__)
