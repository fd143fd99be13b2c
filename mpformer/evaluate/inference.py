"""From a model and images to predictions: one image at a time, so that nothing depends on who predicts it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mpformer import draw
from mpformer.config import Config, Evaluate, TestResize
from mpformer.cores import usable_cores
from mpformer.data.images import load_image, read_image
from mpformer.data.records import Catalog, Record
from mpformer.evaluate import instance as rle
from mpformer.evaluate import postprocess
from mpformer.evaluate.layers import layer_figures
from mpformer.evaluate.postprocess import View
from mpformer.evaluate.postprocess_detr import detr_panoptic
from mpformer.evaluate.prediction import FoundInstance, FoundSegments, Prediction
from mpformer.evaluate.truth import target_of
from mpformer.evaluate.views import aligned, look
from mpformer.ops.allocator import keep_freed_memory
from mpformer.types import ClassTable, InputError, Task

if TYPE_CHECKING:
    from mpformer.model.segmenter import Segmenter

_Loaded = tuple[Record, np.ndarray | None, str]


def predict_records(
    model: Segmenter,
    data: Catalog | Sequence[Record],
    config: Config,
    indices: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    seconds: dict[str, float] | None = None,
) -> Iterator[Prediction]:
    """Predictions of the records `indices` (default: all), in their order, each by itself.

    `config` gives task, test resize and thresholds; `device` is the model's unless said. The next image is
    read while one is predicted. `seconds`, if given, gains the time of each stage: forward, results, layers
    (a GPU is waited for at their ends). Under `data.on_bad_sample: skip` an image that cannot be used gives a
    prediction that holds the `problem` only; else it raises `InputError`.
    """
    records = data.records if isinstance(data, Catalog) else data
    device = torch.device(device) if device is not None else next(model.parameters()).device
    chosen = range(len(records)) if indices is None else indices

    def load(index: int) -> _Loaded:
        record = records[index]
        try:
            if record.problem:
                raise InputError(record.problem)
            return record, load_image(record), ""
        except InputError as error:
            if config.data.on_bad_sample == "error":
                raise
            return record, None, str(error)

    for record, image, problem in _ahead(load, chosen):
        if image is None:
            yield Prediction(record.image_id, (record.height, record.width), problem=problem)
        else:
            yield _predict(model, record, image, config, device, seconds)


@torch.inference_mode()
def _predict(
    model: Segmenter,
    record: Record,
    image: np.ndarray,
    config: Config,
    device: torch.device,
    seconds: dict[str, float] | None,
) -> Prediction:
    resize, options = config.data.test_resize, config.evaluate
    with _timed(seconds, "forward", device):
        [(views, heads)] = look(model, [image], resize, options, device, all_heads=options.layers)
    with _timed(seconds, "results", device):
        found = results(views, config.data.task, options, model.classes).compact(record.image_id)
    if len(heads) == 1 or heads[-1].class_logits is None:
        return found
    with _timed(seconds, "layers", device):
        target = target_of(record, views[0].sizes, config.data.task).to(device)
        layers, _ = layer_figures(heads, target, views[0].sizes, model.config)
    return replace(found, layers=layers)


@contextlib.contextmanager
def _timed(seconds: dict[str, float] | None, stage: str, device: torch.device) -> Iterator[None]:
    if seconds is None:
        yield
        return
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def predict_on_workers(
    model: Segmenter, catalog: Catalog, config: Config, indices: Sequence[int], workers: int
) -> Iterator[Prediction]:
    """`predict_records` by Ray tasks, each an equal share of `indices`; the order is theirs taken in turn.

    A task takes `cluster.cpus_per_worker` CPUs, and a GPU where the cluster has one for each, unless
    `cluster.gpu` is no. Needs `ray.init`. Raises what a task raised.
    """
    import ray
    from ray.exceptions import RayTaskError

    use_gpu = config.cluster.gpu != "no" and ray.cluster_resources().get("GPU", 0) >= workers
    share = ray.remote(num_cpus=config.cluster.cpus_per_worker, num_gpus=int(use_gpu))(_predict_share)
    placed = ray.put((copy.deepcopy(model).cpu(), catalog))
    threads = config.cluster.threads or max(1, usable_cores() // workers)
    streams = [
        share.options(num_returns="streaming").remote(placed, config, list(indices[rank::workers]), threads)
        for rank in range(workers)
    ]
    try:
        for references in itertools.zip_longest(*streams):
            yield from (ray.get(reference) for reference in references if reference is not None)
    except RayTaskError as error:
        raise error.cause from None


def _predict_share(
    placed: tuple[Segmenter, Catalog], config: Config, indices: list[int], threads: int
) -> Iterator[Prediction]:
    model, catalog = placed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(threads)
        keep_freed_memory()
    yield from predict_records(model.to(device), catalog, config, indices, device)


@dataclass(frozen=True)
class Inferred:
    """The results of one image as the task asks for them, on the model's device."""

    size: tuple[int, int]
    classes: ClassTable
    instances: tuple[FoundInstance, ...] | None = None
    """Best first."""
    panoptic: postprocess.Panoptic | None = None
    semantic: Tensor | None = None
    """[h,w] int64 labels, -1 void."""

    def compact(self, image_id: str) -> Prediction:
        """What is kept of it."""
        segments = None
        if self.panoptic is not None:
            ids = self.panoptic.ids.cpu().numpy().astype(np.uint16)
            segments = FoundSegments(draw.encode_png(ids), self.panoptic.labels, self.panoptic.scores)
        labels = None
        if self.semantic is not None:
            narrow = np.uint8 if len(self.classes) <= 255 else np.uint16
            labels = draw.encode_png(self.semantic.cpu().numpy().astype(narrow))  # -1 wraps to the largest
        return Prediction(image_id, self.size, self.instances, segments, labels)


@torch.inference_mode()
def infer(
    model: Segmenter,
    images: Sequence[np.ndarray],
    task: Task,
    resize: TestResize,
    options: Evaluate,
    device: torch.device,
) -> list[Inferred]:
    """Images [h,w,3] uint8 RGB of one size to results, together; the model is left in evaluation mode."""
    looks = look(model, images, resize, options, device)
    return [results(views, task, options, model.classes) for views, _ in looks]


def results(views: Sequence[View], task: Task, options: Evaluate, classes: ClassTable) -> Inferred:
    """The results that a task asks for, from one image's views, the reference first.

    A panoptic task gives panoptic segments, instances of the things and semantic labels. Raises `InputError`
    for a per-pixel model whose task is not semantic.
    """
    if views[0].class_logits is None and task != "semantic":
        raise InputError(f"task {task}: a per-pixel model has no objects; its task is semantic")
    instances = panoptic = semantic = None
    if task in ("instance", "panoptic"):
        instances = find_instances(views[0], options, classes.thing_labels)
    one_order = views
    if task == "panoptic" or options.semantic == "general":
        one_order = aligned(views)
    if task == "panoptic" and options.panoptic == "detr":
        panoptic = detr_panoptic(
            one_order, class_confidence=options.class_confidence, thing_labels=classes.thing_labels
        )
    elif task == "panoptic":
        panoptic = postprocess.panoptic(
            one_order,
            class_confidence=options.class_confidence,
            overlap=options.overlap,
            thing_labels=classes.thing_labels,
        )
    if task in ("semantic", "panoptic"):
        if options.semantic == "general" and views[0].class_logits is not None:
            semantic = postprocess.general(one_order, class_confidence=options.general_confidence)
        else:
            semantic = postprocess.semantic(views, at_original=task == "panoptic")
    return Inferred(views[0].sizes.original, classes, instances, panoptic, semantic)


def find_instances(
    view: View, options: Evaluate, thing_labels: Set[int] | None = None
) -> tuple[FoundInstance, ...]:
    """`postprocess.instance` with its masks encoded, best first."""
    encoded: dict[int, bytes] = {}  # a query may be several instances of different classes
    found = []
    for one in postprocess.instance(
        view,
        top_k=options.top_k,
        score_threshold=options.score_threshold,
        thing_labels=thing_labels,
    ):
        if one.query not in encoded:
            encoded[one.query] = rle.encode(one.crop.cpu().numpy(), one.top, one.left, view.sizes.original)
        found.append(FoundInstance(one.label, one.score, encoded[one.query]))
    return tuple(sorted(found, key=lambda one: -one.score))


def _ahead(load: Callable[[int], _Loaded], items: Iterable[int]) -> Iterator[_Loaded]:
    """load(item) of each item, the next one already at work in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        pending = None
        for item in items:
            upcoming = pool.submit(load, item)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


# --- for people -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmented:
    """One segment of a `Result`."""

    label: int
    name: str
    score: float | None
    """0..1; None in a semantic result."""
    mask: np.ndarray
    """[h,w] bool."""


@dataclass(frozen=True)
class Result:
    """What `segment` found in one image."""

    task: Task
    size: tuple[int, int]
    """(height, width) of the image."""
    classes: ClassTable
    segments: tuple[Segmented, ...]
    """Best first; in a semantic result one per class that is seen, in the order of the class table."""

    def label_map(self) -> np.ndarray:
        """The label of each pixel, [h,w] int32, the best-scored segment on top; -1 where there is none."""
        labels = np.full(self.size, -1, np.int32)
        for one in reversed(self.segments):
            labels[one.mask] = one.label
        return labels

    def overlay(self, image: np.ndarray, at_least: float = 0.5) -> np.ndarray:
        """A picture of the image [h,w,3] uint8 RGB with its segments; of instances those from `at_least` up.

        (Panoptic segments have passed `evaluate.class_confidence` already.)
        """
        shown = [s for s in self.segments if self.task != "instance" or s.score >= at_least]
        masks, labels = [s.mask for s in shown], [s.label for s in shown]
        return draw.overlay(image, masks, labels, self.classes, [s.score for s in shown])


def segment(
    model: Segmenter,
    image: np.ndarray | str | Path,
    task: Task = "panoptic",
    *,
    resize: TestResize | None = None,
    options: Evaluate | None = None,
) -> Result:
    """Segment one image of any size: [h,w,3] or [h,w] uint8 RGB or grey, or the path of an image file.

    `resize` (default: COCO's, short side 800) should be that of the model's recipe; `options` holds the
    thresholds. Raises `InputError` for a file or an array that is no image.
    """
    pixels = _pixels(image)
    device = next(model.parameters()).device
    [found] = infer(model, [pixels], task, resize or TestResize(), options or Evaluate(), device)
    return to_result(found.compact(""), model.classes, task)


def to_result(prediction: Prediction, classes: ClassTable, task: Task) -> Result:
    """A kept prediction with its masks unpacked and its classes named."""
    parts: list[tuple[int, float | None, np.ndarray]] = []
    if task == "instance":
        parts = [(f.label, f.score, rle.decode(f.counts, prediction.size)) for f in prediction.instances]
    elif task == "panoptic":
        ids = draw.decode_png(prediction.panoptic.png)
        described = zip(prediction.panoptic.labels, prediction.panoptic.scores)
        parts = [(label, score, ids == i) for i, (label, score) in enumerate(described, 1)]
        parts.sort(key=lambda part: -part[1])
    else:
        labels = draw.decode_png(prediction.semantic)
        parts = [(k, None, labels == k) for k in range(len(classes)) if (labels == k).any()]
    segments = tuple(Segmented(k, classes.names[k], s, m) for k, s, m in parts)
    return Result(task, prediction.size, classes, segments)


def _pixels(image: np.ndarray | str | Path) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(str(image))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise InputError(f"image: [h,w,3] or [h,w] uint8 is expected, not {list(image.shape)} {image.dtype}")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    if image.shape[2] != 3:
        raise InputError(f"image: 3 channels (RGB) are expected, not {image.shape[2]}")
    return image
