"""Inference: predictions of a data set's images, of arrays and of files.

Images of a data set are predicted one at a time, so results do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from mpformer import draw
from mpformer.config import Config, Data, Evaluate, TestResize
from mpformer.config.nearest import nearest
from mpformer.cores import usable_cores
from mpformer.data.images import load_image, pillow_image, read_image
from mpformer.data.records import Catalog, Record
from mpformer.evaluate import instance as rle
from mpformer.evaluate import postprocess
from mpformer.evaluate.criterion import image_loss
from mpformer.evaluate.layers import layer_metrics
from mpformer.evaluate.postprocess import View
from mpformer.evaluate.postprocess_detr import detr_panoptic
from mpformer.evaluate.prediction import FoundInstance, FoundSegments, Prediction
from mpformer.evaluate.truth import target_of
from mpformer.evaluate.views import align_queries, predict_views
from mpformer.ops.allocator import keep_freed_memory
from mpformer.types import ClassTable, InputError, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from mpformer.model.architecture import Architecture

_POSSIBLE_TASKS: dict[Task, tuple[Task, ...]] = {
    "instance": ("instance", "panoptic"),
    "panoptic": ("instance", "panoptic", "semantic"),
    "semantic": ("semantic",),
}
"""By the task that a model was trained for: without stuff the rest of an image has no label, and a model that
finds one region per class finds no objects."""

_Loaded = tuple[Record, np.ndarray | None, str]
"""A record with its image, or the reason why there is none."""


def predict_records(
    model: Architecture,
    data: Catalog | Sequence[Record],
    config: Config,
    indices: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    seconds: dict[str, float] | None = None,
) -> Iterator[Prediction]:
    """Predictions of the records `indices` (default: all), in their order, one image at a time.

    `config` gives task, test resize and thresholds; `device` defaults to the model's. The next image is read
    while one is predicted. The time of each stage (forward, results, layers) is added to `seconds`, if
    given, which synchronises a GPU. With `data.on_bad_sample: skip` an unusable image gives a prediction
    with its `problem` only; else it raises `InputError`.
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

    for record, image, problem in _prefetched(load, chosen):
        if image is None:
            yield Prediction(record.image_id, (record.height, record.width), problem=problem)
        else:
            yield _predict(model, record, image, config, device, seconds)


@torch.inference_mode()
def _predict(
    model: Architecture,
    record: Record,
    image: np.ndarray,
    config: Config,
    device: torch.device,
    seconds: dict[str, float] | None,
) -> Prediction:
    resize, options = config.data.test_resize, config.evaluate
    with _timed(seconds, "forward", device):
        every = options.layers or options.loss
        [(views, heads)] = predict_views(model, [image], resize, options, device, all_heads=every)
    with _timed(seconds, "results", device):
        found = postprocess_views(views, config.data.task, options, model.classes).compact(record.image_id)
    has_layers = options.layers and len(heads) > 1 and heads[-1].class_logits is not None
    if not (has_layers or options.loss):
        return found
    sizes = views[0].sizes
    with _timed(seconds, "layers", device):
        target = target_of(record, sizes, config.data.task).to(device)
        if has_layers:
            layers, _ = layer_metrics(heads, target, sizes, model)
            found = replace(found, layers=layers)
    if options.loss:
        with _timed(seconds, "loss", device):
            found = replace(found, loss=image_loss(heads, target, sizes, record.image_id, model))
    return found


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
    model: Architecture, catalog: Catalog, config: Config, indices: Sequence[int], workers: int
) -> Iterator[Prediction]:
    """`predict_records` by Ray tasks with equal shares of `indices`; their predictions are interleaved.

    A task claims `cluster.cpus_per_worker` CPUs, and a GPU if the cluster has one for each, unless
    `cluster.gpu` is no. Needs `ray.init`. Re-raises the error of a task.
    """
    import ray
    from ray.exceptions import RayTaskError

    use_gpu = config.cluster.gpu != "no" and ray.cluster_resources().get("GPU", 0) >= workers
    share = ray.remote(num_cpus=config.cluster.cpus_per_worker, num_gpus=int(use_gpu))(_predict_share)
    placed = ray.put((copy.deepcopy(model).cpu(), catalog))
    threads = config.cluster.threads or max(1, usable_cores() // workers)
    streams: list[Any] = [  # ray's types do not cover streaming tasks
        share.options(num_returns="streaming").remote(placed, config, list(indices[rank::workers]), threads)
        for rank in range(workers)
    ]
    try:
        for references in itertools.zip_longest(*streams):
            yield from (ray.get(reference) for reference in references if reference is not None)
    except RayTaskError as error:
        raise error.cause from None


def _predict_share(
    placed: tuple[Architecture, Catalog], config: Config, indices: list[int], threads: int
) -> Iterator[Prediction]:
    model, catalog = placed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(threads)
        keep_freed_memory()
    yield from predict_records(model.to(device), catalog, config, indices, device)


@dataclass(frozen=True)
class ImageResults:
    """The results for one image, those of its task, on the model's device."""

    size: tuple[int, int]
    classes: ClassTable
    instances: tuple[FoundInstance, ...] | None = None
    """Sorted by score, best first."""
    panoptic: postprocess.Panoptic | None = None
    semantic: Tensor | None = None
    """[h,w] int64 labels, -1 void."""

    def compact(self, image_id: str) -> Prediction:
        """The results as run lengths and PNG."""
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
    model: Architecture,
    images: Sequence[np.ndarray],
    task: Task,
    resize: TestResize,
    options: Evaluate,
    device: torch.device,
) -> list[ImageResults]:
    """Results for a batch of images [h,w,3] uint8 RGB of one size. Switches the model to evaluation mode."""
    predicted = predict_views(model, images, resize, options, device)
    return [postprocess_views(views, task, options, model.classes) for views, _ in predicted]


def postprocess_views(
    views: Sequence[View], task: Task, options: Evaluate, classes: ClassTable
) -> ImageResults:
    """The results of a task from the views of one image, the reference first.

    The panoptic task gives panoptic segments, instances of the thing classes and semantic labels. Raises
    `InputError` for a per-pixel model with another task than semantic.
    """
    if views[0].class_logits is None and task != "semantic":
        raise InputError(f"task {task}: a per-pixel model predicts no objects; data.task must be semantic")
    instances = panoptic = semantic = None
    if task in ("instance", "panoptic"):
        instances = find_instances(views[0], options, classes.thing_labels)
    ordered = views
    if task == "panoptic" or options.semantic == "general":
        ordered = align_queries(views)
    if task == "panoptic" and options.panoptic == "detr":
        panoptic = detr_panoptic(
            ordered, class_confidence=options.class_confidence, thing_labels=classes.thing_labels
        )
    elif task == "panoptic":
        panoptic = postprocess.panoptic(
            ordered,
            class_confidence=options.class_confidence,
            overlap=options.overlap,
            thing_labels=classes.thing_labels,
        )
    if task in ("semantic", "panoptic"):
        if options.semantic == "general" and views[0].class_logits is not None:
            semantic = postprocess.general(ordered, class_confidence=options.general_confidence)
        else:
            semantic = postprocess.semantic(views, at_original=task == "panoptic")
    return ImageResults(views[0].sizes.original, classes, instances, panoptic, semantic)


def find_instances(
    view: View, options: Evaluate, thing_labels: Set[int] | None = None
) -> tuple[FoundInstance, ...]:
    """`postprocess.instance` with encoded masks, best score first."""
    encoded: dict[int, bytes] = {}  # by query, which may give instances of several classes
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


def _prefetched(load: Callable[[int], _Loaded], items: Iterable[int]) -> Iterator[_Loaded]:
    """load(item) of each item; a thread loads the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        pending = None
        for item in items:
            upcoming = pool.submit(load, item)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


# --- one image ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultSegment:
    """One segment of a `Result`."""

    label: int
    name: str
    score: float | None
    """0..1; None in semantic results."""
    mask: np.ndarray
    """[h,w] bool."""


@dataclass(frozen=True)
class Result:
    """The result of `segment` for one image."""

    task: Task
    size: tuple[int, int]
    """(height, width) of the image."""
    classes: ClassTable
    segments: tuple[ResultSegment, ...]
    """Sorted by score, best first; in semantic results one per class present, in the order of the table."""

    def label_map(self) -> np.ndarray:
        """The label of each pixel, [h,w] int32, that of its best-scored segment; -1 where there is none."""
        labels = np.full(self.size, -1, np.int32)
        for one in reversed(self.segments):
            labels[one.mask] = one.label
        return labels

    def overlay(self, image: np.ndarray, min_score: float = 0.5) -> np.ndarray:
        """The image [h,w,3] uint8 RGB with its segments drawn on it, see `draw.overlay`.

        Instances below `min_score` are left out. (`evaluate.class_confidence` applies to panoptic segments.)
        """
        shown = [s for s in self.segments if self.task != "instance" or (s.score or 0.0) >= min_score]
        masks, labels = [s.mask for s in shown], [s.label for s in shown]
        return draw.overlay(image, masks, labels, self.classes, [s.score for s in shown])


def segment(
    model: Architecture,
    image: np.ndarray | Image | str | Path,
    task: Task | None = None,
    *,
    resize: TestResize | None = None,
    options: Evaluate | None = None,
    bits: int | None = None,
) -> Result:
    """Segment one image of any size.

    model: what `mpformer.load` opens, or a model that was built.
    image: [h,w,3] uint8 RGB or [h,w] uint8 grey, a PIL image of any mode, or the path of an image file.
    task: "instance", "panoptic" (segments that do not overlap) or "semantic" (a class for each pixel). A
    model for the panoptic task does all three; one for instances finds no stuff, one for semantic labels no
    objects. Default: the task that the model was trained for; "panoptic" for a model that was built.
    resize, options: test size, and thresholds such as `top_k`. Default: those of the model's run; for a model
    that was built those of COCO (short side 800) and of `mpformer.config.Evaluate`.
    bits: those in use of 16-bit images. Default: `data.bits` of the model's run, else 16.

    Returns a `Result` at the size of the image: its `segments` have `name`, `label`, `score` and `mask`,
    `label_map()` is one map of labels, `overlay(pixels)` a picture. Raises `InputError` for what is no image,
    a task that is none, and one that the model was not trained for.

    >>> result = mpformer.segment(model, "image.jpg")
    >>> [(segment.name, round(segment.score, 2)) for segment in result.segments[:2]]
    [("cat", 0.97), ("dog", 0.88)]
    """
    run = model.settings
    task = _checked_task(task, run)
    data = run.data if run else Data()
    pixels = _pixels(image, bits or data.bits or 16)
    options = options or (run.evaluate if run else Evaluate())
    device = next(model.parameters()).device
    [found] = infer(model, [pixels], task, resize or data.test_resize, options, device)
    return to_result(found.compact(""), model.classes)


def _checked_task(task: str | None, run: Config | None) -> Task:
    """The task to do: by default that of the model's run. Raises `InputError` for one that it cannot do."""
    trained = run.data.task if run else "panoptic"
    wanted = next((known for known in get_args(Task) if known == (task or trained)), None)
    if wanted is None:
        names = ", ".join(get_args(Task))
        raise InputError(f"task: {task!r} is none of {names}; nearest: {nearest(str(task), get_args(Task))}")
    possible = _POSSIBLE_TASKS[trained]
    if wanted not in possible:
        raise InputError(
            f"task {wanted}: the model was trained for the task {trained}: "
            f"{' or '.join(possible)} is expected"
        )
    return wanted


def to_result(prediction: Prediction, classes: ClassTable) -> Result:
    """The prediction with decoded masks and class names. `ValueError` for one of an unusable image."""
    found: list[tuple[int, float | None, np.ndarray]]
    task: Task
    if prediction.panoptic is not None:
        ids, segments = prediction.panoptic.ids(), prediction.panoptic
        order = sorted(range(len(segments.scores)), key=lambda i: -segments.scores[i])
        task, found = "panoptic", [(segments.labels[i], segments.scores[i], ids == i + 1) for i in order]
    elif prediction.instances is not None:
        masks = (rle.decode(one.counts, prediction.size) for one in prediction.instances)
        task, found = "instance", [(one.label, one.score, m) for one, m in zip(prediction.instances, masks)]
    elif prediction.semantic is not None:
        labels = draw.decode_png(prediction.semantic)
        seen = [k for k in range(len(classes)) if (labels == k).any()]
        task, found = "semantic", [(k, None, labels == k) for k in seen]
    else:
        raise ValueError(f"image {prediction.image_id} has no result: {prediction.problem}")
    named = tuple(ResultSegment(k, classes.names[k], score, mask) for k, score, mask in found)
    return Result(task, prediction.size, classes, named)


def _pixels(image: object, bits: int) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(str(image), bits)
    if (picture := pillow_image(image, bits)) is not None:
        return picture
    if not isinstance(image, np.ndarray):
        raise InputError(f"image: an array, a PIL image or a path is expected, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise InputError(f"image: [h,w,3] or [h,w] uint8 is expected, not {list(image.shape)} {image.dtype}")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    if image.shape[2] != 3:
        raise InputError(f"image: 3 channels (RGB) are expected, not {image.shape[2]}")
    return image
