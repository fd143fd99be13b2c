"""What a training step costs, counted, not timed: operator calls and bytes through memory, phase by phase.

    PYTHONPATH=. python benchmarks/step_budget.py [--batch 16] [--objects 7] [--size 1024] [--recipe RECIPE]

The step runs on the device "meta", where tensors have shapes but no values, so it needs no GPU. A call is an
operator that PyTorch dispatches, without views, which launch nothing. The bytes of a call are those of its
inputs and results, in float32: what a GPU moves if every operator is a kernel of its own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpformer.config import Config, load_config
from mpformer.model import matcher
from mpformer.model.architecture import Architecture, build_model
from mpformer.train import step
from mpformer.types import Batch, ClassTable, Target

CLASSES = 80
PHASES = ("pilots", "forward", "match", "losses", "backward", "optimizer")
_VIEWS = {"detach", "alias", "lift_fresh"}
"""Operators that launch nothing, besides those that PyTorch calls views."""


@dataclass
class Count(TorchDispatchMode):
    """Calls and bytes by phase: a dispatch mode to put around a step, and the timers to give to it."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes by phase and operator."""
    phase: str = "other"

    def __post_init__(self) -> None:
        super().__init__()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket.__name__ in _VIEWS:
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        self.calls[self.phase] += 1
        self.bytes[self.phase] += moved
        self.operators[self.phase, function.overloadpacket.__name__] += moved
        return result


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Makes a step possible on "meta": what goes to the host are ones."""

    def to_host(values: Tensor) -> Tensor:
        return torch.ones(values.shape, dtype=values.dtype)

    with (
        mock.patch.object(matcher, "to_host", to_host),
        mock.patch.object(step, "to_host", to_host),
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),  # knows no "meta"
    ):
        yield


def empty_batch(images: int, objects: int, size: int) -> Batch:
    """Shapes of square images with that many objects each."""
    with torch.device("meta"):
        labels, masks = (
            torch.empty(objects, dtype=torch.long),
            torch.empty(objects, size, size, dtype=torch.bool),
        )
        return Batch(
            torch.empty(images, 3, size, size, dtype=torch.uint8),
            tuple(Target(labels, masks) for _ in range(images)),
            ((size, size),) * images,
            tuple(map(str, range(images))),
            tuple(range(images)),
        )


def model_on_meta(config: Config, classes: int = CLASSES) -> Architecture:
    with torch.device("meta"):
        return build_model(config.model.without_pretrained(), ClassTable.numbered(classes)).train()


def budget(model: Architecture, config: Config, images: int, objects: int, size: int) -> Count:
    """The cost of one step of a model of `model_on_meta`."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    batch, classes = empty_batch(images, objects, size), model.structure.classes
    count = Count()
    with on_meta(), count:
        step.train_step(model, optimizer, batch, config, count, classes=classes)
    return count


def before_the_optimizer(count: Count) -> tuple[int, int]:
    """Calls and bytes of all phases but the optimiser's."""
    phases = [phase for phase in count.calls if phase != "optimizer"]
    return sum(count.calls[p] for p in phases), sum(count.bytes[p] for p in phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--recipe", default="coco-instance-r50")
    options = parser.parse_args()
    variants = {
        "MP-Former": [],
        "MP-Former, released flavour": ["model.pilot.flavour=released"],
        "Mask2Former": ["model.pilot.queries=0"],
    }
    print(
        f"{options.recipe}: {options.batch} images of {options.size}x{options.size}, "
        f"{options.objects} objects each"
    )
    for name, settings in variants.items():
        config = load_config(options.recipe, [*settings, "train.micro_batch=null"])
        count = budget(model_on_meta(config), config, options.batch, options.objects, options.size)
        calls, moved = before_the_optimizer(count)
        print(f"\n{name}: {calls} calls, {moved / 1e9:.0f} GB before the optimiser")
        for phase in sorted(count.calls, key=lambda p: PHASES.index(p) if p in PHASES else -1):
            largest = [(n, b) for (p, n), b in count.operators.most_common() if p == phase][:3]
            told = ", ".join(f"{operator} {moved / 1e9:.0f}" for operator, moved in largest)
            print(f"  {phase:10} {count.calls[phase]:6} calls {count.bytes[phase] / 1e9:7.0f} GB   ({told})")


if __name__ == "__main__":
    main()
