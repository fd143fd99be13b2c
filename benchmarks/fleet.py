"""What a fleet costs a run: writing and reading checkpoints, and a second node.

python benchmarks/fleet.py checkpoint [RECIPE]      seconds and bytes, best interval by interruption rate
python benchmarks/fleet.py nodes DATA               two local Ray nodes against one, tiny model on the CPU
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mpformer.ablation.makespan import Interruptions, best_interval
from mpformer.config import load_config, run_name

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "experiments" / "recipes" / "coco-instance-r50.yaml"
RESTART_HOURS = 0.1


def time_checkpoint(recipe: Path) -> None:
    import torch

    from mpformer.model.segmenter import build_model
    from mpformer.train import checkpoint
    from mpformer.train.optim import build_optimizer

    config = load_config(recipe, ["model.backbone.pretrained=null"])
    model = build_model(config.model, 80)
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        seconds = {}
        began = time.perf_counter()
        saved = checkpoint.save(
            Path(folder), 1, model, optimizer, config, {"train_seconds": 0, "skipped": []}
        )
        seconds["write"], began = time.perf_counter() - began, time.perf_counter()
        found, _ = checkpoint.latest(Path(folder))
        seconds["check"], began = time.perf_counter() - began, time.perf_counter()
        checkpoint.restore(found, model, optimizer)
        seconds["restore"] = time.perf_counter() - began
        size = sum(file.stat().st_size for file in saved.path.iterdir())
    print(f"{recipe.stem}: {size / 1e6:.0f} MB; " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
    hours = seconds["write"] / 3600
    for rate in (0.01, 0.05, 0.2, 1.0):
        best = best_interval(rate, hours)
        half = Interruptions(rate, 0.5, hours, RESTART_HOURS).spent(100)
        least = Interruptions(rate, best, hours, RESTART_HOURS).spent(100)
        print(
            f"  {rate:g} interruptions/h: best every {best * 60:.1f} min, time x {least.factor:.4f}; "
            f"every 30 min x {half.factor:.4f}, writing {100 * half.checkpoints / half.total:.2f} %"
        )


def time_nodes(data: Path) -> None:
    from ray.cluster_utils import Cluster

    small = {"include_dashboard": False, "object_store_memory": 200 << 20}
    for nodes in (1, 2):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
        for _ in range(nodes):
            cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
        with tempfile.TemporaryDirectory() as folder:
            recipe = ROOT / "experiments" / "recipes" / "synthetic-panoptic-tiny.yaml"
            settings = [
                f"data.root={data}",
                f"storage={folder}",
                f"cluster.workers={nodes}",
                "cluster.cpus_per_worker=1.5",
                "cluster.threads=1",
                "tracking.mlflow=null",
                "train.length=60 steps",
                "evaluate.every=null",
                "evaluate.limit=1",
                "evaluate.pictures=0",
            ]
            command = [sys.executable, "-m", "mpformer", "train", str(recipe), *settings]
            environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            run_dir = Path(folder) / run_name(load_config(recipe, settings))
            summary = json.loads((run_dir / "summary.json").read_text())
        cluster.shutdown()
        timers = {k: round(v, 2) for k, v in summary["timers_seconds"].items()}
        print(f"{nodes} node(s): {summary['images_per_second']:.1f} images/s; {timers}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "checkpoint":
        time_checkpoint(Path(sys.argv[2]) if len(sys.argv) > 2 else RECIPE)
    else:
        time_nodes(Path(sys.argv[2]).resolve())
