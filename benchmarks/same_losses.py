"""Compare the losses of two commits, or of two settings: same seeds, equal up to rounding.

    python benchmarks/same_losses.py HEAD~3 .                       a commit and the working tree
    python benchmarks/same_losses.py . . --b train.compile=true     a setting

Small models train a few steps on generated scenes for every configuration in CASES; settings given as `--a`
and `--b` override those of one side. Prints the largest relative difference of any loss and of the gradient
norm, in the first step and in all steps. Exit code 1 if one is above the tolerance. Later steps amplify
rounding: points or matches that are tied up to rounding may be decided differently.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

CASES: dict[str, tuple[str, ...]] = {
    "Mask2Former": ("model.pilot.queries=0",),
    "MP-Former": (),
    "released": ("model.pilot.flavour=released",),
    "shift and scale": ("model.pilot.noise=[{kind: shift}, {kind: scale}]",),
    "matched pilots": ("model.pilot.assignment=match",),
    "padding ignored": ("model.loss.padding=ignored",),
    "full masks": ("model.loss.points=null",),
    "fixed matching, consistency": ("model.loss.matching=last_head", "model.loss.consistency_weight=1.0"),
    "micro-batches": ("train.micro_batch=1",),
}

RECIPE = """
model:
  backbone: {name: resnet18, pretrained: null, norm: group_norm}
  pixel_decoder: {channels: 32, layers: 1, heads: 4, ffn: 32}
  decoder: {layers: 3, queries: 20, heads: 4, ffn: 32}
  pilot: {queries: 30}
  loss: {points: 256}
train: {lr: 1.0e-4, clip_norm: 0.1}
"""

CLASSES, SIZE, OBJECTS = 5, 128, (4, 0, 17)


def run(recipe: Path, overrides: list[str], steps: int) -> list[dict[str, float]]:
    """The losses and the gradient norm of each step. Uses only what old commits have, too."""
    import torch

    import mpformer
    from mpformer.train.optim import build_optimizer
    from mpformer.train.step import train_step
    from mpformer.train.timing import Timers
    from mpformer.types import Batch, Target

    config = mpformer.load_config(recipe, overrides)
    torch.manual_seed(0)
    model = mpformer.build_model(config.model, CLASSES).train()
    optimizer = build_optimizer(model, config.train)
    random = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    recorded = []
    for step in range(steps):
        targets = []
        for count in OBJECTS:
            center_y, center_x, radius = (torch.rand(3, count, 1, 1, generator=random) * SIZE).unbind(0)
            masks = (y - center_y) ** 2 + (x - center_x) ** 2 < (radius / 3 + 1) ** 2
            targets.append(Target(torch.randint(0, CLASSES, (count,), generator=random), masks))
        count = len(OBJECTS)
        images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)
        positions = tuple(range(step * count, (step + 1) * count))
        valid = ((SIZE, SIZE), (SIZE - 28, SIZE), (SIZE, SIZE - 45))
        batch = Batch(images, tuple(targets), valid, tuple(map(str, positions)), positions)
        result = train_step(model, optimizer, batch, config, Timers(), classes=CLASSES)
        # up to 9e5fc0a the optimised total was losses["loss"], which is the matching part's sum since
        total = result.total if hasattr(result, "total") else result.losses["loss"]
        terms = {k: float(v) for k, v in result.losses.items() if k not in ("loss", "pilot_loss")}
        recorded.append(terms | {"total": float(total), "gradient": float(result.grad_norm)})
    return recorded


@contextmanager
def tree(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit; '.' is the working tree."""
    if commit == ".":
        yield REPOSITORY
        return
    with tempfile.TemporaryDirectory(prefix="same-losses-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(REPOSITORY), "archive", commit, "mpformer"], stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def run_in(folder: Path, cases: dict[str, list[str]], steps: int) -> dict[str, list[dict[str, float]]]:
    """`run` of every case in a process that imports mpformer from the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({"cases": cases, "steps": steps}))
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, __file__, "--job", str(job)], env=environment, check=True)
        return json.loads(job.with_name("losses.json").read_text())


def work(job: Path) -> None:
    """Entry point of the process of `run_in`."""
    recipe = job.with_name("recipe.yaml")
    recipe.write_text(RECIPE)
    task = json.loads(job.read_text())
    losses = {case: run(recipe, overrides, task["steps"]) for case, overrides in task["cases"].items()}
    job.with_name("losses.json").write_text(json.dumps(losses))


def largest_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> tuple[float, str]:
    """The largest relative difference and its place; infinite if only one side has a loss, NaN if a loss
    is NaN."""
    worst = (0.0, "")
    for step, (one, other) in enumerate(zip(a, b, strict=True)):
        for name in one.keys() | other.keys():
            if name not in one or name not in other:
                return float("inf"), f"step {step}, {name} on one side only"
            scale = max(abs(one[name]), abs(other[name]), 1e-12)
            difference = abs(one[name] - other[name]) / scale
            if math.isnan(difference):
                return difference, f"step {step}, {name}"
            if difference > worst[0]:
                worst = (difference, f"step {step}, {name}")
    return worst


def main() -> int:
    """Compare, print a table; 1 if the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", nargs="?", default="HEAD", metavar="A", help="a commit, or . (working tree)")
    parser.add_argument("second", nargs="?", default=".", metavar="B")
    parser.add_argument("--a", nargs="*", default=[], metavar="key=value", help="settings of A")
    parser.add_argument("--b", nargs="*", default=[], metavar="key=value", help="settings of B")
    parser.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        work(given.job)
        return 0
    names = [n.strip() for n in given.cases.split(",")] if given.cases else list(CASES)
    results = []
    for commit, settings in ((given.first, given.a), (given.second, given.b)):
        with tree(commit) as folder:
            results.append(run_in(folder, {n: [*CASES[n], *settings] for n in names}, given.steps))
    differ = False
    print(f"largest relative differences, {given.first} {given.a} and {given.second} {given.b}")
    print(f"\n| case | first step | {given.steps} steps | where | |\n|---|---|---|---|---|")
    for name in names:
        a, b = results[0][name], results[1][name]
        first, _ = largest_difference(a[:1], b[:1])
        whole, where = largest_difference(a, b)
        same = whole <= given.tolerance
        differ |= not same
        print(f"| {name} | {first:.1e} | {whole:.1e} | {where} | {'same' if same else 'DIFFERENT'} |")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
