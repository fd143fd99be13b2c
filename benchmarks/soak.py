"""A long run of the data pipeline through Ray Data: does the memory of Ray's processes grow with it?

    python benchmarks/soak.py [--steps 3000] [--size 1024] [--batch 16] [--rate IMAGES_PER_SECOND]

Batches are taken as fast as they come, or at a given rate, as a training step would, and thrown away. Every
hundredth of the run the private memory (USS) of every process of the local Ray cluster is noted; `--out
FOLDER` draws its curve. The in-process loader is timed for comparison, before Ray starts.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from data_pipeline import write_folder

from mpformer.config import Data, LargeScaleJitter
from mpformer.data.bench import throughput
from mpformer.data.catalog import open_split
from mpformer.data.pipeline import train_batches
from mpformer.data.records import Catalog


def private_memory() -> dict[str, float]:
    """MB that only the processes of one kind hold, by kind."""
    held: dict[str, float] = defaultdict(float)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error, IndexError):
            held[kind_of(process)] += process.memory_full_info().uss / 1e6
    return held


def kind_of(process: psutil.Process) -> str:
    """Busy and idle workers are one kind, each of Ray's own actors and programs another."""
    title = process.cmdline()[0]
    if process.pid == psutil.Process().pid:
        return "consumer"
    if title.startswith("ray::"):
        return title if title.startswith("ray::_") else "data tasks"
    return process.name()


def soak(data: Data, catalog: Catalog, arguments: argparse.Namespace) -> tuple[float, list[dict[str, float]]]:
    """Images per second, and the private memory a hundred times."""
    batches = train_batches(
        data, catalog, seed=0, batch_size=arguments.batch, steps=range(arguments.steps), rank=0, world=1
    )
    next(batches)
    began, memory = time.monotonic(), []
    for step, _ in enumerate(batches, 1):
        if arguments.rate:
            time.sleep(max(0.0, began + step * arguments.batch / arguments.rate - time.monotonic()))
        if step % max(1, arguments.steps // 100) == 0:
            memory.append(private_memory())
    return (arguments.steps - 1) * arguments.batch / (time.monotonic() - began), memory


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, help="images per second that are taken; all if left out")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for memory.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(Path(folder), images=64, objects=7)
        data = data.model_copy(update={"augment": LargeScaleJitter(size=(arguments.size, arguments.size))})
        catalog = open_split(data, "train")
        inline = throughput(data.model_copy(update={"loader": "inline"}), catalog, arguments.batch, 8)
        ray.init(
            address="local",
            num_cpus=arguments.cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        rate, memory = soak(data.model_copy(update={"loader": "ray"}), catalog, arguments)
        ray.shutdown()
    run = f"{arguments.steps} steps of {arguments.batch} images, {arguments.size}x{arguments.size}"
    print(f"{run}, {arguments.cpus} CPUs: {rate:.1f} images/s; in-process: {inline.images_per_second:.1f}\n")
    print("| MB, private | a tenth through | half | end |\n|---|---|---|---|")
    moments = [memory[len(memory) // 10], memory[len(memory) // 2], memory[-1]]
    for kind in sorted(moments[-1], key=moments[-1].__getitem__, reverse=True):
        print(f"| {kind} | " + " | ".join(f"{m.get(kind, 0.0):.0f}" for m in moments) + " |")
    if arguments.out:
        draw(memory, arguments.steps, arguments.out / "memory.png")


def draw(memory: list[dict[str, float]], steps: int, path: Path) -> None:
    """A line for each kind of process that ever held 20 MB."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({kind for one in memory for kind, held in one.items() if held > 20})
    steps_of = [steps * (index + 1) / len(memory) for index in range(len(memory))]
    for kind in kinds:
        axes.plot(steps_of, [one.get(kind, 0.0) for one in memory], label=kind)
    axes.set_xlabel("step")
    axes.set_ylabel("private memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
