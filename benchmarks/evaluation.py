"""Cost of an evaluation relative to its forward pass, and of post-processing in the usual order of steps.

    python benchmarks/evaluation.py results [--queries 100] [--classes 80] [--repeat 5]
    python benchmarks/evaluation.py stages RECIPE [--images 10] [--first 0] [key=value ...]
    python benchmarks/evaluation.py memory [--images 5000]

`results`: from the last head of one image of 640x480 (network input 800x1088) to encoded instances. "Usual
way" upsamples every mask to the input and to the original size, and scores and encodes whole masks; both run
alternately on the same heads, and their scores and masks are compared. Masks are blobs of all sizes.
`stages`: a model with random weights on the images of a recipe's validation split: seconds of each stage,
fraction of the forward pass, peak memory. Times are CPU times of the process, which other load affects less.
`memory`: resident memory during an evaluation of images of 320x240, with a stand-in for the model that finds
100 objects in each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config import Config, Evaluate, TestResize, load_config
from mpformer.data.catalog import open_split
from mpformer.data.images import load_image
from mpformer.data.records import Catalog, Record, Records, Rle, Segment, build_table
from mpformer.draw import encode_png
from mpformer.evaluate.evaluation import evaluate, peak_memory
from mpformer.evaluate.inference import find_instances, postprocess_views
from mpformer.evaluate.layers import layer_metrics
from mpformer.evaluate.metrics import score
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.truth import target_of
from mpformer.evaluate.views import predict_views
from mpformer.model.architecture import build_model
from mpformer.types import ClassTable, Head, Output

SIZES = Sizes((800, 1088), (800, 1067), (480, 640))


def blobs(
    queries: int,
    classes: int,
    seed: int = 0,
    size: tuple[int, int] = (SIZES.padded[0] // 4, SIZES.padded[1] // 4),
    smallest: float = 2.5,
) -> View:
    """Elliptic masks between 20 and 600 pixels wide in the network input; moderately confident classes."""
    g = torch.Generator().manual_seed(seed)
    h, w = size
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    uniform = torch.rand(queries, 4, generator=g)
    radius = smallest * 30 ** uniform[:, 2:, None, None]
    distance = ((y - uniform[:, 0, None, None] * h) / radius[:, 0]) ** 2
    distance = distance + ((x - uniform[:, 1, None, None] * w) / radius[:, 1]) ** 2
    return View(torch.randn(queries, classes + 1, generator=g) * 3, 8 * (1 - distance).clamp(min=-2), SIZES)


def usual_way(view: View, top_k: int = 100) -> list[tuple[int, float, bytes]]:
    """Upsample every mask twice, then score and encode the best (query, class) pairs."""
    masks = F.interpolate(view.mask_logits[None], SIZES.padded, mode="bilinear", align_corners=False)
    masks = masks[..., : SIZES.valid[0], : SIZES.valid[1]]
    masks = F.interpolate(masks, SIZES.original, mode="bilinear", align_corners=False)[0]
    probabilities = view.class_logits.softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(top_k)
    masks = masks[best.indices // probabilities.shape[1]]
    binary = masks > 0
    confidence = (masks.sigmoid().flatten(1) * binary.flatten(1)).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    encoded = [coco_mask.encode(np.asfortranarray(m.numpy().view(np.uint8)))["counts"] for m in binary]
    labels = (best.indices % probabilities.shape[1]).tolist()
    return list(zip(labels, (best.values * confidence).tolist(), encoded))


def results(queries: int, classes: int, repeat: int) -> None:
    """Compare `find_instances` with the usual way."""
    view, options = blobs(queries, classes), Evaluate()
    ours, theirs = find_instances(view, options), usual_way(view)
    scores = sorted(score for _, score, counts in theirs if score > 0)
    gap = max(abs(a.score - b) for a, b in zip(reversed(ours), scores))
    masks = {bytes(one.counts) for one in ours}
    same = sum(counts in masks for _, score, counts in theirs if score > 0)
    print(
        f"{len(ours)} instances (usual way {len(scores)}), largest score difference {gap:.1e}, "
        f"{same} masks identical"
    )
    times = {"ours": [], "usual way": []}
    for _ in range(repeat):
        times["ours"].append(seconds(lambda: find_instances(view, options)))
        times["usual way"].append(seconds(lambda: usual_way(view)))
    medians = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    for name, median in medians.items():
        print(f"{name:10} {1000 * median:8.1f} ms (best {1000 * min(times[name]):.1f})")
    print(f"ratio      {medians['usual way'] / medians['ours']:8.2f}")


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    with torch.inference_mode():
        work()
    return time.process_time() - start


class _Finder(nn.Module):
    """A model that predicts 100 blobs of all sizes, others in each image."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = ClassTable.numbered(80)
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images: Tensor, all_heads: bool = False) -> Output:
        self.seen += 1
        view = blobs(100, 80, self.seen, (images.shape[2] // 4, images.shape[3] // 4), smallest=0.8)
        return Output((Head(view.class_logits[None] * self.scale, view.mask_logits[None]),))


def memory(images: int) -> None:
    """Resident memory during an evaluation of images with 7 objects and 100 predictions each."""
    random = np.random.default_rng(0)
    pixels = encode_png(random.integers(0, 255, (240, 320, 3)).astype(np.uint8))
    records = []
    for number in range(images):
        segments = []
        for index in range(7):
            mask = np.zeros((240, 320), bool)
            (y, x), (h, w) = random.integers(0, 150, 2), random.integers(10, 90, 2)
            mask[y : y + h, x : x + w] = True
            rle = Rle(coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))["counts"])
            segments.append(
                Segment(int(random.integers(80)), False, rle, float(mask.sum()), 7 * number + index)
            )
        records.append(Record(f"{number}", "", 320, 240, tuple(segments)))
    model = _Finder()
    catalog = Catalog("generated", model.classes, build_table(records, ""), "")
    catalog = replace(catalog, records=_WithImage(catalog.records, pixels))
    del records
    config = Config()
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"test_resize": TestResize(short=128, long=192)}),
            "evaluate": config.evaluate.model_copy(update={"layers": False}),
        }
    )

    def report(done: int, total: int, _: float) -> None:
        if done in (1, total) or done % 1000 == 0:
            print(f"{done:6} images: {psutil.Process().memory_info().rss / 2**20:7.0f} MiB", flush=True)

    found, usage = evaluate(model, catalog, config, report=report)
    count = sum(len(p.instances or ()) for p in found.predictions)
    print(f"{count} predictions, {count / images:.1f} per image; AP {found.scores.summary['AP']:.2f}")
    for stage, seconds in usage.seconds.items():
        print(f"{stage:10} {seconds:8.1f} s")
    print(f"peak, metrics included: {usage.peak_memory / 2**20:.0f} MiB")


@dataclass(frozen=True)
class _WithImage(Records):
    """Records that share one image."""

    records: Sequence[Record]
    pixels: bytes

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        return replace(self.records[index], image=self.pixels)


def stages(recipe: str, settings: list[str], images: int, first: int) -> None:
    """CPU seconds of each stage of an evaluation."""
    config = load_config(recipe, ["model.backbone.pretrained=null", *settings])
    split = open_split(config.data, "val")
    torch.manual_seed(0)
    model = build_model(config.model, split.classes).eval()
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        with torch.inference_mode():
            result = work()
        spent[stage] += time.process_time() - start
        return result

    predictions = []
    resize, options, task = config.data.test_resize, config.evaluate, config.data.task
    count = min(images, len(split.records) - first)
    for record in split.records[first : first + count]:
        image = timed("read", lambda r=record: load_image(r))
        [(views, heads)] = timed(
            "forward",
            lambda i=image: predict_views(model, [i], resize, options, torch.device("cpu"), all_heads=True),
        )
        predictions.append(
            timed(
                "results",
                lambda v=views, r=record: postprocess_views(v, task, options, model.classes).compact(
                    r.image_id
                ),
            )
        )
        sizes = views[0].sizes
        timed(
            "layers",
            lambda r=record, h=heads, s=sizes: layer_metrics(h, target_of(r, s, task), s, model),
        )
    timed("metrics", lambda: score(predictions, split, task))
    print(f"{config.name}: {count} images from index {first}, {torch.get_num_threads()} threads")
    for stage, seconds in spent.items():
        share = seconds / spent["forward"]
        print(f"{stage:10} {seconds / count:8.3f} s per image {share:7.1%} of the forward pass")
    share = (spent["results"] + spent["metrics"]) / spent["forward"]
    print(f"results and metrics together: {share:.1%} of the forward pass")
    print(f"peak memory {peak_memory() / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ours = commands.add_parser("results")
    for name, default in (("queries", 100), ("classes", 80), ("repeat", 5)):
        ours.add_argument(f"--{name}", type=int, default=default)
    whole = commands.add_parser("stages")
    whole.add_argument("recipe")
    whole.add_argument("--images", type=int, default=10)
    whole.add_argument("--first", type=int, default=0)
    held = commands.add_parser("memory")
    held.add_argument("--images", type=int, default=5000)
    arguments, settings = parser.parse_known_args()
    if arguments.command == "results":
        results(arguments.queries, arguments.classes, arguments.repeat)
    elif arguments.command == "memory":
        memory(arguments.images)
    else:
        stages(arguments.recipe, settings, arguments.images, arguments.first)


if __name__ == "__main__":
    main()
