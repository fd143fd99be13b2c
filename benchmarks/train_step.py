"""Times a whole training step: our Mask2Former and MP-Former beside transformers' Mask2Former.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train_step.py

A step is forward, matching, losses, backward, clipping and AdamW, in float32, on the same images and objects.
Every repetition starts from the same weights and random numbers. Ours is `mpformer.train.step.train_step`
itself. The parts are those of further, instrumented steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import (
    CLASSES,
    TRANSFORMERS,
    Stopwatch,
    arguments,
    interleave,
    machine,
    normalized,
    our_config,
    our_model,
    own_peak,
    peak_memory,
    print_memory,
    print_parts,
    print_times,
    scenes,
    their_model,
)

from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from mpformer.types import Batch

OURS: dict[str, dict[str, Any]] = {
    "Mask2Former": {"pilot": {"queries": 0}},
    "MP-Former": {},
    "MP-Former, shared points": {"loss": {"shared_pilot_points": True}},
}
REFERENCES = {
    "Mask2Former": TRANSFORMERS,
    "MP-Former": "Mask2Former",
    "MP-Former, shared points": "Mask2Former",
}

Step = Callable[[], dict[str, float]]
"""One training step; it returns the seconds of its parts."""


def our_step(settings: dict[str, Any], batch: Batch, tiny: bool) -> Step:
    config = our_config(settings, tiny)
    model = our_model(config).train()
    optimizer = build_optimizer(model, config.train)
    parts = {"backbone": model.backbone, "pixel decoder": model.pixel_decoder, "decoder": model.decoder}
    watch, timers = Stopwatch(parts), Timers()

    def step() -> dict[str, float]:
        train_step(model, optimizer, batch, config, timers, classes=CLASSES)
        seconds = timers.take()
        end = time.perf_counter() - seconds["optimizer"]
        parts = watch.take(end)
        losses_backward = watch.first_mark - (end - seconds["backward"])
        return {
            **parts,
            "pilots": seconds["pilots"],
            "matching": seconds["match"],
            "losses, forward": seconds["losses"],
            "losses, backward": losses_backward,
            "optimiser": seconds["optimizer"],
        }

    return step


def their_step(batch: Batch, tiny: bool) -> Step:
    model = their_model(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    images = normalized(batch.images)
    masks = [target.masks.float() for target in batch.targets]
    labels = [target.labels for target in batch.targets]
    whole = model.model
    watch = Stopwatch(
        {
            "backbone": whole.pixel_level_module.encoder,
            "pixel decoder": whole.pixel_level_module.decoder,
            "decoder": whole.transformer_module,
        }
    )
    criterion = Stopwatch({"losses": model.criterion, "matching": model.criterion.matcher})

    def step() -> dict[str, float]:
        loss = model(pixel_values=images, mask_labels=masks, class_labels=labels).loss
        start = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        parts = watch.take(end)
        losses = criterion.take(end)
        return {
            **parts,
            "matching": losses["matching, forward"],
            "losses, forward": losses["losses, forward"] - losses["matching, forward"],
            "losses, backward": watch.first_mark - start,
            "optimiser": time.perf_counter() - end,
        }

    return step


def contender(name: str, batch: Batch, tiny: bool) -> Step:
    return their_step(batch, tiny) if name == TRANSFORMERS else our_step(OURS[name], batch, tiny)


def _recording(step: Step, taken: list[dict[str, float]]) -> Callable[[], None]:
    return lambda: taken.append(step())


def main() -> None:
    """Prints the tables."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--objects", default="5,20", help="objects per image, comma-separated")
    given = parser.parse_args()
    if given.memory_of:
        step = contender(given.memory_of, scenes(given.images, int(given.objects), given.size), given.tiny)
        for _ in range(3):
            step()
        print(own_peak())
        return

    print(machine())
    names = given.only.split(",") if given.only else [TRANSFORMERS, *OURS]
    for objects in map(int, given.objects.split(",")):
        print(f"\n## {objects} objects, {given.images} x {given.size}x{given.size}, float32")
        if not given.no_memory:
            used = {name: peak_memory(__file__, name, given, objects) for name in names}
        batch = scenes(given.images, objects, given.size)
        steps = {name: contender(name, batch, given.tiny) for name in names}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        passes = {name: _recording(step, taken[name]) for name, step in steps.items()}
        print_times(interleave(passes, given.repetitions), REFERENCES)
        print_parts({name: parts[1:] for name, parts in taken.items()})
        if not given.no_memory:
            print_memory(used)


if __name__ == "__main__":
    main()
