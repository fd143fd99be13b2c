"""Benchmark of inference with instance post-processing: ours and transformers' Mask2Former.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/inference.py

From a normalised or uint8 image to the masks of the best 100 (query, class) pairs at the image's size. With
random weights no score reaches a usual threshold, so both keep all 100.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from contenders import (
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
    waiting,
)
from device_time import wait

from mpformer.evaluate.postprocess import Sizes, View, instance
from mpformer.ops.allocator import keep_freed_memory
from mpformer.types import Batch

OURS = "ours"
Pass = Callable[[], dict[str, float]]


def our_pass(batch: Batch, tiny: bool, autocast: bool) -> Pass:
    device = batch.images.device
    model = our_model(our_config({}, tiny)).to(device).eval()
    watch = Stopwatch(
        {"backbone": model.backbone, "pixel decoder": model.pixel_decoder, "decoder": model.decoder}
    )
    size = (batch.images.shape[2], batch.images.shape[3])

    @torch.inference_mode()
    def run() -> dict[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            (head,) = model(batch.images).heads
        wait(device)
        start = time.perf_counter()
        for b in range(len(batch)):
            found = list(instance(View(head.class_logits[b], head.mask_logits[b], Sizes(size, size, size))))
            assert len(found) > 0
        wait(device)
        end = time.perf_counter()
        return {**watch.take(end), "post-processing": end - start}

    return run


def their_pass(batch: Batch, tiny: bool, autocast: bool) -> Pass:
    import transformers

    device = batch.images.device
    model = their_model(tiny).to(device)
    processor = transformers.Mask2FormerImageProcessor()
    images = normalized(batch.images)
    level = model.model.pixel_level_module
    watch = Stopwatch(
        {
            "backbone": level.encoder,
            "pixel decoder": level.decoder,
            "decoder": model.model.transformer_module,
        }
    )
    sizes = [(batch.images.shape[2], batch.images.shape[3])] * len(batch)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            outputs = model(pixel_values=images)
        wait(device)
        start = time.perf_counter()
        processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        wait(device)
        end = time.perf_counter()
        return {**watch.take(end), "post-processing": end - start}

    return run


def contender(name: str, batch: Batch, given: argparse.Namespace) -> Pass:
    how = batch.to(given.device), given.tiny, given.precision == "bfloat16"
    return their_pass(*how) if name == TRANSFORMERS else our_pass(*how)


def _recording(run: Pass, taken: list[dict[str, float]]) -> Callable[[], None]:
    return lambda: taken.append(run())


def main() -> None:
    """Print the tables."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--objects", type=int, default=5, help="unused objects of the generated scenes")
    given = parser.parse_args()
    if given.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this system's C library cannot")
    batch = scenes(given.images, given.objects, given.size)
    if given.memory_of:
        run = contender(given.memory_of, batch, given)
        for _ in range(3):
            run()
        print(own_peak(given.device))
        return

    print(machine(given.device, given.keep_memory))
    names = given.only.split(",") if given.only else [TRANSFORMERS, OURS]
    print(f"\n## {given.images} x {given.size}x{given.size}, {given.precision}")
    if not given.no_memory:
        used = {name: peak_memory(__file__, name, given, given.objects) for name in names}
    runs = {name: contender(name, batch, given) for name in names}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    passes = {name: _recording(run, taken[name]) for name, run in runs.items()}
    print_times(interleave(passes, given.repetitions), {OURS: TRANSFORMERS})
    if given.device == "cuda":
        with waiting():
            taken = {name: [run() for _ in range(4)] for name, run in runs.items()}
    print_parts({name: parts[1:] for name, parts in taken.items()})
    if not given.no_memory:
        print_memory(used)


if __name__ == "__main__":
    main()
