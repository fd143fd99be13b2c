"""`mpformer diagnose`: all metrics of the decoder layers on a data set, and the paper's Table 1 of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config import Config, Evaluate
from mpformer.data.images import load_image
from mpformer.data.records import Catalog, Record
from mpformer.draw import overlay, side_by_side
from mpformer.evaluate.inference import find_instances, postprocess_views
from mpformer.evaluate.instance import ImageInstances, average_precision
from mpformer.evaluate.layers import (
    attention_inside,
    flatten,
    layer_iou,
    layer_metrics,
    mean_over_images,
    query_utilization,
    without_padding,
)
from mpformer.evaluate.metrics import score
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.prediction import LayerMetrics, Prediction
from mpformer.evaluate.truth import target_of, true_instances
from mpformer.evaluate.views import forward, prepare, view_of
from mpformer.model.matcher import Match
from mpformer.model.objects import in_a_row
from mpformer.model.piloting import make_pilots, plan_pilots
from mpformer.model.streams import SampleRandom
from mpformer.types import ClassInfo, ClassTable, Head, InputError, Target

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture

_TITLES = {
    "layer_iou": "mIoU-L",
    "query_utilization": "Util",
    "pilot_layer_iou": "pilots: mIoU-L",
    "pilot_query_utilization": "pilots: Util, matched",
    "pilot_query_utilization_hard": "pilots: Util, own object",
    "attention_inside": "attention inside the object",
    "PQ": "PQ",
    "AR100": "AR@100, any class",
}

_HIGHLIGHT = ClassTable((ClassInfo("mask", 0, True, (235, 40, 90)),))


@dataclass(frozen=True)
class Diagnostics:
    """Layer metrics of a data set, in percent."""

    layers: LayerMetrics
    images: int

    def metrics(self) -> dict[str, float]:
        """{"layer_iou_3": 59.5, ...}"""
        return flatten(self.layers)

    def table(self) -> str:
        """Table 1 of MP-Former: one column per layer, in percent; a dash where a metric is undefined."""
        layers = sorted({layer for values in self.layers.values() for layer in values})
        width = max(map(len, _TITLES.values()))
        lines = [f"{'layer':{width}}" + "".join(f"{layer:>7}" for layer in layers)]
        for name, title in _TITLES.items():
            if name in self.layers:
                cells = (self.layers[name].get(layer) for layer in layers)
                text = "".join(f"{'-' if c is None else format(c, '.1f'):>7}" for c in cells)
                lines.append(f"{title:{width}}{text}")
        return "\n".join(lines)


def diagnose(
    model: Architecture,
    catalog: Catalog,
    config: Config,
    indices: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    *,
    quality: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> Diagnostics:
    """All layer metrics on the images `indices` (default: all) of a catalog.

    mIoU-L and Util of the matching part, and of the mask-piloted part if the model has one (a second forward,
    with the ground truth without noise as pilots); attention inside the object; with `quality` also PQ
    (panoptic tasks) and class-agnostic AR@100 of every head, which upsamples the masks of every head.
    `report` is called with (images done, of all). Switches the model to evaluation mode. Raises `InputError`
    for a per-pixel model.
    """
    if model.structure.per_pixel:
        raise InputError("diagnose: a per-pixel model has no object queries to compare between layers")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    chosen = list(range(len(catalog.records)) if indices is None else indices)
    layers: list[LayerMetrics] = []
    heads = _HeadResults()
    for done, index in enumerate(chosen, 1):
        record = catalog.records[index]
        layers.append(_image_metrics(model, record, config, device, heads if quality else None))
        if report:
            report(done, len(chosen))
    found = mean_over_images(layers) | heads.metrics(catalog)
    return Diagnostics({name: values for name, values in found.items() if values}, len(chosen))


@dataclass(frozen=True)
class _HeadResults:
    """The results of every head on all images, by layer, for the metrics of a whole data set."""

    panoptic: dict[int, list[Prediction]] = field(default_factory=dict)
    proposals: dict[int, list[ImageInstances]] = field(default_factory=dict)
    """Class-agnostic instances."""

    def add(
        self, model: Architecture, heads: Sequence[Head], sizes: Sizes, record: Record, config: Config
    ) -> None:
        truth = [replace(t, label=0) for t in true_instances(record)]
        for layer, head in zip(model.structure.layers_of(len(heads)), heads):
            view = view_of(head, sizes)
            if config.data.task == "panoptic":
                results = postprocess_views([view], "panoptic", config.evaluate, model.classes)
                self.panoptic.setdefault(layer, []).append(results.compact(record.image_id))
            found = find_instances(_class_agnostic(view), Evaluate())
            self.proposals.setdefault(layer, []).append(ImageInstances(sizes.original, truth, found))

    def metrics(self, catalog: Catalog) -> LayerMetrics:
        """PQ and AR100 by layer, in percent."""
        one_class = ClassTable.numbered(1)
        quality = {i: score(p, catalog, "panoptic") for i, p in sorted(self.panoptic.items())}
        recall = {i: average_precision(p, one_class, {0}) for i, p in sorted(self.proposals.items())}
        return {
            name: {layer: s.summary[name] for layer, s in scores.items() if name in s.summary}
            for name, scores in (("PQ", quality), ("AR100", recall))
        }


@torch.inference_mode()
def _image_metrics(
    model: Architecture, record: Record, config: Config, device: torch.device, results: _HeadResults | None
) -> LayerMetrics:
    """The layer metrics of one image; its results are added to `results`."""
    image = load_image(record)
    tensor, sizes = prepare(image, config.data.test_resize)
    images, target = tensor.to(device), target_of(record, sizes, config.data.task).to(device)
    with model.recorded_attention() as attention:
        heads = forward(model, images, all_heads=True)
    metrics, matched = layer_metrics(heads, target, sizes, model)
    inside = {}
    for layer, (weights, strides) in enumerate(zip(attention, model.structure.attention_strides), 1):
        share = attention_inside(weights[0], target.masks, matched, strides)
        if share is not None:
            inside[layer] = share
    if inside:
        metrics["attention_inside"] = inside
    if model.structure.takes_pilots and len(target.labels):
        metrics |= _pilot_metrics(model, images, target, sizes)
    if results is not None:
        results.add(model, heads, sizes, record, config)
    return metrics


def _class_agnostic(view: View) -> View:
    """The view with two classes: object of any class, and no-object."""
    logits = view.class_logits
    if logits is None:
        raise ValueError("a per-pixel model has no object queries")
    return replace(view, class_logits=torch.stack((logits[:, :-1].logsumexp(1), logits[:, -1]), 1))


def _pilot_metrics(model: Architecture, images: Tensor, target: Target, sizes: Sizes) -> LayerMetrics:
    """Layer metrics of one group of pilots without noise; "hard" Util ties each pilot to its own object."""
    count = len(target.labels)
    pilot = model.config.pilot.model_copy(update={"queries": count, "noise": (), "label_noise": 0.0})
    objects, draws = in_a_row([target]), SampleRandom(0, [0], images.device)
    plan = plan_pilots(objects, pilot, draws)
    if plan is None:
        return {}
    pilots = make_pilots(plan, objects, pilot, model.structure, draws)
    heads = model(images, pilots).pilots
    metrics, _ = layer_metrics(heads, target, sizes, model, "pilot_")
    own = Match(torch.arange(count), pilots.objects[0].cpu())
    fixed = query_utilization([own] * len(heads))
    metrics["pilot_query_utilization_hard"] = {
        i: u for i, u in zip(model.structure.layers_of(len(heads)), fixed) if i > 0
    }
    return metrics


# --- Figure 1 -------------------------------------------------------------------------------------


@torch.inference_mode()
def draw_layers(
    model: Architecture, record: Record, config: Config, device: torch.device | str, columns: int = 6
) -> np.ndarray | None:
    """One query's mask after each layer, as in MP-Former's Figure 1; [h,w,3] uint8 RGB.

    The query is the least consistent one (smallest mean IoU between layers) among those whose last mask has
    an IoU of at least 0.5 with its object, of at least 1 % of the image. None if there is no such query.
    """
    image = load_image(record)
    tensor, sizes = prepare(image, config.data.test_resize)
    target = target_of(record, sizes, config.data.task).to(device)
    heads = forward(model, tensor.to(device), all_heads=True)
    _, matched = layer_metrics(heads, target, sizes, model)
    cropped, unpadded = without_padding(heads, target, sizes)
    objects = F.avg_pool2d(unpadded.masks[:, None].float(), 4)[:, 0] - 0.5  # positive inside, like logits
    min_cells = 0.01 * objects[0].numel() if len(objects) else 0
    pairs = [
        (query, index)
        for query, index in zip(matched.queries.tolist(), matched.objects.tolist())
        if (objects[index] >= 0).sum() >= min_cells
        and layer_iou([cropped[-1].mask_logits[0, query, None], objects[index, None]])[0] >= 0.5
    ]
    if not pairs:
        return None
    ious = {pair: layer_iou([h.mask_logits[0, pair[0], None] for h in cropped]) for pair in pairs}
    query, index = min(pairs, key=lambda pair: sum(ious[pair]))
    name = model.classes.names[int(target.labels[index])]
    full_size = View(None, target.masks[index][None].float() - 0.5, sizes)
    grey = np.repeat(
        image.mean(2, keepdims=True).astype(np.uint8), 3, axis=2
    )  # so that only the mask is coloured
    tiles, titles = [], []
    for number, head in zip(model.structure.layers_of(len(heads)), heads):
        logits = view_of(head, sizes).upsampler(torch.tensor([query], device=device))
        mask = (logits(slice(0, sizes.original[0]))[:, 0] >= 0).cpu().numpy()
        tiles.append(overlay(grey, [mask], [0], _HIGHLIGHT, captions=False))
        iou = f": IoU {ious[query, index][len(tiles) - 2]:.2f} to the mask before" if len(tiles) > 1 else ""
        titles.append(f"layer {number}{iou}" if number else f"query {query} before layer 1")
    truth = (full_size.upsampler()(slice(0, sizes.original[0]))[:, 0] >= 0).cpu().numpy()
    tiles.append(overlay(grey, [truth], [0], _HIGHLIGHT, captions=False))
    titles.append(f"ground truth: {name}")
    return side_by_side(tiles, titles, columns=columns)
