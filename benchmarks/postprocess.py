"""Benchmark of post-processing: ours and transformers' Mask2FormerImageProcessor on the same head.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/postprocess.py

From the class and mask logits of 100 queries of one image to results at its size. Every mask fills the image
and every query has another best class, so that nothing can be left out: both keep 100 instances, and as many
queries of a panoptic result as are confident. Note that transformers resizes all logits to 384x384 first,
whatever the size of the input, decides there, and resizes the decisions (instances) or the probabilities;
ours are decided at the size of the image (semantic: of the input), as in the official code. Both keep freed
memory unless --default-allocator is given.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from types import SimpleNamespace

import torch
from contenders import CLASSES, TRANSFORMERS, interleave, machine, print_times, printed_by
from torch.nn import functional as F

from mpformer.evaluate.postprocess import Sizes, View, instance, panoptic, semantic
from mpformer.ops.allocator import keep_freed_memory

OURS = "ours"
SIZES = {
    "384x384, not resized": Sizes((384, 384), (384, 384), (384, 384)),
    "512x512, not resized": Sizes((512, 512), (512, 512), (512, 512)),
    "640x480 from 1067x800": Sizes((800, 1088), (800, 1067), (480, 640)),
}
CONFIDENT = {"instance": 100, "panoptic, 20 confident": 20, "panoptic, 100 confident": 100, "semantic": 100}
THINGS = frozenset(range(53))
STUFF = frozenset(range(53, CLASSES))


def head(sizes: Sizes, confident: int) -> View:
    """100 masks that vary over 16 pixels; queries without an object are certain of that."""
    g = torch.Generator().manual_seed(0)
    coarse = 4 * torch.randn(1, 100, *(edge // 16 for edge in sizes.padded), generator=g)
    masks = F.interpolate(coarse, tuple(edge // 4 for edge in sizes.padded), mode="bicubic")[0]
    classes = torch.randn(100, CLASSES + 1, generator=g)
    classes[torch.arange(100), torch.arange(100) % CLASSES] = 12.0
    classes[confident:, -1] = 20.0
    return View(classes, masks, sizes)


def ours(task: str, view: View) -> Callable[[], object]:
    if task == "instance":
        return lambda: list(instance(view))
    if task == "semantic":
        return lambda: semantic([view])
    return lambda: panoptic([view], overlap=0.0, thing_labels=THINGS)


def theirs(task: str, view: View) -> Callable[[], object]:
    import transformers

    processor = transformers.Mask2FormerImageProcessor()
    outputs = SimpleNamespace(
        class_queries_logits=view.class_logits[None], masks_queries_logits=view.mask_logits[None]
    )
    sizes = [view.sizes.original]
    if task == "instance":
        return lambda: processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
    if task == "semantic":
        return lambda: processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    return lambda: processor.post_process_panoptic_segmentation(
        outputs,
        threshold=0.8,
        overlap_mask_area_threshold=0.0,
        label_ids_to_fuse=STUFF,
        target_sizes=sizes,
    )


def contender(name: str, task: str, size: str) -> Callable[[], None]:
    """One call; its results are freed before it returns."""
    call = (ours if name == OURS else theirs)(task, head(SIZES[size], CONFIDENT[task]))

    @torch.inference_mode()
    def run() -> None:
        call()

    return run


def peak_growth(run: Callable[[], None]) -> float:
    """MB by which three calls raise the peak of this process, library code not counted."""
    before = resident("RssAnon")
    for _ in range(3):
        run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident("RssFile")
    return (peak - before) * 1024 / 1e6


def resident(kind: str) -> int:
    """KiB of this process's memory of a kind."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--only", choices=CONFIDENT, help="one task")
    parser.add_argument("--size", choices=SIZES, help="one size")
    parser.add_argument("--default-allocator", action="store_true", help="return freed memory to the system")
    parser.add_argument("--no-memory", action="store_true", help="leave out what measures memory")
    parser.add_argument("--memory-of", choices=(OURS, TRANSFORMERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.default_allocator and not keep_freed_memory():
        parser.error("this system's C library cannot keep freed memory: use --default-allocator")
    if given.memory_of:
        print(peak_growth(contender(given.memory_of, given.only, given.size)))
        return

    print(machine("cpu", not given.default_allocator))
    allocator = ["--default-allocator"] if given.default_allocator else []
    for size in (given.size,) if given.size else SIZES:
        for task in (given.only,) if given.only else CONFIDENT:
            print(f"\n## {task}, {size}")
            runs = {name: contender(name, task, size) for name in (TRANSFORMERS, OURS)}
            print_times(interleave(runs, given.repetitions), {OURS: TRANSFORMERS})
            if not given.no_memory:
                flags = [f"--only={task}", f"--size={size}", *allocator]
                used = {n: printed_by(__file__, [*flags, f"--memory-of={n}"]) for n in runs}
                print("\nPeak MB beyond the logits: " + ", ".join(f"{n} {mb:.0f}" for n, mb in used.items()))


if __name__ == "__main__":
    main()
