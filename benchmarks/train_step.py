"""Benchmark of a training step: our Mask2Former and MP-Former, and transformers' Mask2Former.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train_step.py
    PYTHONPATH=. python benchmarks/train_step.py --device cuda --size 1024 --images 8 --precision bfloat16

A step is forward, matching, losses, backward, clipping and AdamW, on the same images and objects. Every
repetition starts from the same weights and random numbers. Ours is `mpformer.train.step.train_step`. On a GPU
times of parts are from additional steps that wait at each border. With `--kernels`, and always on a GPU,
device time by kernel is shown, too, and the arithmetic rate is compared with that of a large matrix product.
`--trace FILE` writes a Chrome trace of a step of each contender instead. Requires torch, torchvision,
timm, transformers, scipy, PyYAML and pydantic, but neither Ray nor a data set.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from contenders import (
    CLASSES,
    TRANSFORMERS,
    StepTimers,
    Stopwatch,
    arguments,
    fitting,
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
    waiting,
)
from device_time import device_times, flops, matmul_rate, print_kernels, wait, write_trace

from mpformer.ops.allocator import keep_freed_memory
from mpformer.train.execution import prepare
from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.types import Batch

OURS: dict[str, dict[str, Any]] = {
    "Mask2Former": {"pilot": {"queries": 0}},
    "MP-Former": {},
    "MP-Former with shared points": {"loss": {"shared_pilot_points": True}},
}
REFERENCES = {
    "Mask2Former": TRANSFORMERS,
    "MP-Former": "Mask2Former",
    "MP-Former with shared points": "Mask2Former",
}

CHANNELS_LAST = {
    f"channels-last {name}": {**settings, "train": {"channels_last": True}} for name, settings in OURS.items()
}
REFERENCES |= {f"channels-last {name}": name for name in OURS}
COMPILED = {f"compiled {name}": {**settings, "train": {"compile": True}} for name, settings in OURS.items()}
REFERENCES |= {f"compiled {name}": name for name in OURS}
ALL_OURS = {**OURS, **CHANNELS_LAST, **COMPILED}

Step = Callable[[], dict[str, float]]
"""Run a training step; returns the seconds of its parts."""


def our_step(settings: dict[str, Any], batch: Batch, tiny: bool, autocast: bool) -> Step:
    config = our_config(settings, tiny)
    model = our_model(config).to(batch.images.device).train()
    optimizer = build_optimizer(model, config.train)
    prepare(model, config.train)
    parts = {"backbone": model.backbone, "pixel decoder": model.pixel_decoder, "decoder": model.decoder}
    watch = Stopwatch({} if config.train.compile else parts)  # its hooks would break the graphs
    timers = StepTimers(watch)

    def step() -> dict[str, float]:
        train_step(model, optimizer, batch, config, timers, classes=CLASSES, autocast=autocast)
        seconds = timers.take()
        end = watch.now() - seconds["optimizer"]
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


def their_step(batch: Batch, tiny: bool, autocast: bool) -> Step:
    device = batch.images.device
    model = their_model(tiny).to(device)
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
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(pixel_values=images, mask_labels=masks, class_labels=labels).loss
        start = watch.now()
        loss.backward()
        end = watch.now()
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
            "optimiser": watch.now() - end,
        }

    return step


def contender(name: str, batch: Batch, given: argparse.Namespace) -> Step:
    how = batch.to(given.device), given.tiny, given.precision == "bfloat16"
    return their_step(*how) if name == TRANSFORMERS else our_step(ALL_OURS[name], *how)


def _recording(step: Step, taken: list[dict[str, float]], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        taken.append(step())
        wait(device)

    return run


def print_rates(steps: dict[str, Step], times: dict[str, list[float]], given: argparse.Namespace) -> None:
    """Print images per second, the arithmetic rate compared with the device's, and the kernels."""
    device = torch.device(given.device)
    limit = matmul_rate(device, getattr(torch, given.precision))
    print(f"\nA large matrix product in {given.precision}: {limit / 1e12:.1f} TFLOP/s")
    print("\n| | images/s | TFLOP of a step | TFLOP/s | of the product's |\n|---|---|---|---|---|")
    compiled = steps.keys() & COMPILED.keys()  # counted without, since graphs hide what they are made of
    for name, step in steps.items():
        if name in compiled:
            print(
                f"| {name} | {given.images / (statistics.median(times[name]) / 1e3):.1f} | | | |", flush=True
            )
            continue
        seconds, work = statistics.median(times[name]) / 1e3, flops(step)
        rate = work / seconds
        print(
            f"| {name} | {given.images / seconds:.1f} | {work / 1e12:.2f} | {rate / 1e12:.1f} | "
            f"{100 * rate / limit:.0f} % |",
            flush=True,
        )
    for name, step in steps.items():
        print_kernels(name, device_times(step, device), statistics.median(times[name]))


def main() -> None:
    """Print the tables."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--objects", default="5,20", help="objects per image, comma-separated")
    parser.add_argument("--compile", action="store_true", help="ours with train.compile, too")
    parser.add_argument("--channels-last", action="store_true", help="ours with train.channels_last, too")
    parser.add_argument("--kernels", action="store_true", help="device time by kernel, too")
    parser.add_argument("--trace", help="write a Chrome trace, of which {} stands for the contender, and end")
    given = parser.parse_args()
    if given.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this system's C library cannot")
    if given.memory_of:
        step = contender(given.memory_of, scenes(given.images, int(given.objects), given.size), given)
        for _ in range(3):
            step()
        print(own_peak(given.device))
        return

    print(machine(given.device, given.keep_memory))
    everyone = [TRANSFORMERS, *OURS]
    everyone += CHANNELS_LAST if given.channels_last else ()
    everyone += COMPILED if given.compile else ()
    names = given.only.split(",") if given.only else everyone
    for objects in map(int, given.objects.split(",")):
        print(f"\n## {objects} objects, {given.images} x {given.size}x{given.size}, {given.precision}")
        if not given.no_memory:
            used_memory = {name: peak_memory(__file__, name, given, objects) for name in names}
        batch = scenes(given.images, objects, given.size)
        steps = {name: contender(name, batch, given) for name in names}
        device = torch.device(given.device)
        if given.trace:
            for name, step in steps.items():
                write_trace(step, device, given.trace.replace("{}", name.replace(" ", "-").lower()))
            continue
        fit = fitting(steps, device)
        steps = {name: steps[name] for name in fit}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        passes = {name: _recording(step, taken[name], device) for name, step in steps.items()}
        times = interleave(passes, given.repetitions)
        print_times(times, REFERENCES)
        if device.type == "cuda":
            print("\n| | peak GB of a step above weights and states |\n|---|---|")
            for name, used in fit.items():
                print(f"| {name} | {used / 1e9:.1f} |", flush=True)
            with waiting():
                parts = {name: [step() for _ in range(4)] for name, step in steps.items()}
            print_parts({name: of_one[1:] for name, of_one in parts.items()})
        else:
            print_parts({name: parts[1:] for name, parts in taken.items()})
        if given.kernels or device.type == "cuda":
            print_rates(steps, times, given)
        if not given.no_memory:
            print_memory(used_memory)


if __name__ == "__main__":
    main()
