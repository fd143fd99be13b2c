"""`mpformer diagnose`: all figures of the decoder's layers on a data set, and the paper's Table 1 of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config import Config, Evaluate
from mpformer.data.images import load_image
from mpformer.data.records import Catalog, Record
from mpformer.draw import overlay, side_by_side
from mpformer.evaluate.inference import find_instances, results
from mpformer.evaluate.instance import ImageInstances, average_precision
from mpformer.evaluate.layers import (
    attention_inside,
    flat,
    layer_figures,
    layer_iou,
    layer_numbers,
    means,
    query_utilization,
    without_padding,
)
from mpformer.evaluate.metrics import score
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.prediction import Figures, Prediction
from mpformer.evaluate.truth import target_of, true_instances
from mpformer.evaluate.views import forward, prepare, view_of
from mpformer.model.matcher import Match
from mpformer.model.piloting import make_pilots
from mpformer.model.streams import SampleRandom
from mpformer.types import ClassInfo, ClassTable, InputError, Target

if TYPE_CHECKING:
    from mpformer.model.segmenter import Segmenter

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

_STRIDES = (32, 16, 8)
"""Of the memories 0, 1, 2."""

_HIGHLIGHT = ClassTable((ClassInfo("mask", 0, True, (235, 40, 90)),))


@dataclass(frozen=True)
class Diagnostics:
    """Figures of a data set by name and layer, in percent."""

    figures: Figures
    images: int

    def metrics(self) -> dict[str, float]:
        """{"layer_iou_3": 59.5, ...}"""
        return flat(self.figures)

    def table(self) -> str:
        """Table 1 of MP-Former: a column per layer, percent; a dash where a figure does not exist."""
        layers = sorted({layer for values in self.figures.values() for layer in values})
        width = max(map(len, _TITLES.values()))
        lines = [f"{'layer':{width}}" + "".join(f"{layer:>7}" for layer in layers)]
        for name, title in _TITLES.items():
            if name in self.figures:
                cells = (self.figures[name].get(layer) for layer in layers)
                text = "".join(f"{'-' if c is None else format(c, '.1f'):>7}" for c in cells)
                lines.append(f"{title:{width}}{text}")
        return "\n".join(lines)


def diagnose(
    model: Segmenter,
    catalog: Catalog,
    config: Config,
    indices: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    *,
    quality: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> Diagnostics:
    """All figures of the layers on the images `indices` (default: all) of a catalog.

    mIoU-L and Util of the matching part; of the mask-piloted part, too, when the model has one (fed the
    ground truth without noise: a second forward); attention inside the object; with `quality` also PQ
    (panoptic tasks) and class-agnostic AR@100 of every head, which upsamples every head's masks. `report` is
    told (done, of all). The model is left in evaluation mode.
    """
    if model.config.output == "per_pixel":
        raise InputError("diagnose: a per-pixel model has no objects whose layers could be compared")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    chosen = list(range(len(catalog.records)) if indices is None else indices)
    figures: list[Figures] = []
    per_head: dict[int, list[Prediction]] = {}
    proposals: dict[int, list[ImageInstances]] = {}
    for done, index in enumerate(chosen, 1):
        record = catalog.records[index]
        figures.append(_image_figures(model, record, config, device, quality, per_head, proposals))
        if report:
            report(done, len(chosen))
    found = means(figures)
    if per_head:
        found["PQ"] = _per_layer(
            {layer: score(p, catalog, "panoptic").summary.get("PQ") for layer, p in per_head.items()}
        )
    if proposals:
        recall = {
            layer: average_precision(images, ClassTable.numbered(1), {0}).summary.get("AR100")
            for layer, images in proposals.items()
        }
        found["AR100"] = _per_layer(recall)
    return Diagnostics({name: values for name, values in found.items() if values}, len(chosen))


def _per_layer(values: dict[int, float | None]) -> dict[int, float]:
    return {layer: value for layer, value in sorted(values.items()) if value is not None}


@torch.inference_mode()
def _image_figures(
    model: Segmenter,
    record: Record,
    config: Config,
    device: torch.device,
    quality: bool,
    per_head: dict[int, list[Prediction]],
    proposals: dict[int, list[ImageInstances]],
) -> Figures:
    image = load_image(record)
    tensor, sizes = prepare(image, config.data.test_resize)
    images, target = tensor.to(device), target_of(record, sizes, config.data.task).to(device)
    with _watched(model) as attention:
        heads = forward(model, images, all_heads=True)
    figures, matched = layer_figures(heads, target, sizes, model.config)
    inside = {}
    for layer, (weights, levels) in enumerate(zip(attention, model.config.decoder.levels()), 1):
        strides = [_STRIDES[level] for level in levels]
        share = attention_inside(weights, target.masks, matched, strides)
        if share is not None:
            inside[layer] = share
    if inside:
        figures["attention_inside"] = inside
    if model.decoder.pilot_embed is not None and len(target.labels):
        figures |= _pilot_figures(model, images, target, sizes)
    if quality:
        truth = [replace(t, label=0) for t in true_instances(record)]
        for layer, head in zip(layer_numbers(heads, model.config), heads):
            if config.data.task == "panoptic":
                inferred = results([view_of(head, sizes)], "panoptic", config.evaluate, model.classes)
                per_head.setdefault(layer, []).append(inferred.compact(record.image_id))
            found = find_instances(_any_class(view_of(head, sizes)), Evaluate())
            proposals.setdefault(layer, []).append(ImageInstances(sizes.original, truth, found))
    return figures


def _any_class(view: View) -> View:
    """The view with two classes: an object of whatever class, or none."""
    logits = view.class_logits
    return replace(view, class_logits=torch.stack((logits[:, :-1].logsumexp(1), logits[:, -1]), 1))


def _pilot_figures(model: Segmenter, images: Tensor, target: Target, sizes: Sizes) -> Figures:
    """The same of one group of pilots without noise: matched in each layer, and by what they stand for."""
    count = len(target.labels)
    pilot = model.config.pilot.model_copy(update={"queries": count, "noise": (), "label_noise": 0.0})
    settings = model.config.model_copy(update={"pilot": pilot})
    draws = SampleRandom(0, "diagnostics", [0], images.device)
    pilots = make_pilots([target], settings, len(model.classes), draws)
    heads = model(images, pilots).pilots
    figures, _ = layer_figures(heads, target, sizes, model.config, "pilot_")
    own = Match(torch.arange(count), pilots.objects[0].cpu())
    fixed = query_utilization([own] * len(heads))
    figures["pilot_query_utilization_hard"] = {
        i: u for i, u in zip(layer_numbers(heads, model.config), fixed) if i > 0
    }
    return figures


@contextlib.contextmanager
def _watched(model: Segmenter) -> Iterator[list[Tensor]]:
    """The cross-attention weights [Q,h*w] of each decoder layer that runs meanwhile."""
    seen: list[Tensor] = []

    def note(attention: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        query, key, _, *where = inputs
        seen.append(attention.weights(query, key, *where)[0])

    hooks = [layer.cross_attn.register_forward_pre_hook(note) for layer in model.decoder.layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --- Figure 1 -------------------------------------------------------------------------------------


@torch.inference_mode()
def draw_layers(
    model: Segmenter, record: Record, config: Config, device: torch.device | str, columns: int = 6
) -> np.ndarray | None:
    """One query's mask over the layers, as in MP-Former's Figure 1; [h,w,3] uint8.

    The query is the one that wavers most (its mean IoU from layer to layer is the smallest) among those that
    end up on an object of at least 1 % of the image: IoU of the last mask at least 0.5. None where there is
    no such query.
    """
    image = load_image(record)
    tensor, sizes = prepare(image, config.data.test_resize)
    target = target_of(record, sizes, config.data.task).to(device)
    heads = forward(model, tensor.to(device), all_heads=True)
    _, matched = layer_figures(heads, target, sizes, model.config)
    cut, whole = without_padding(heads, target, sizes)
    things = F.avg_pool2d(whole.masks[:, None].float(), 4)[:, 0] - 0.5  # logits of a kind
    least = 0.01 * things[0].numel() if len(things) else 0
    pairs = [
        (query, thing)
        for query, thing in zip(matched.queries.tolist(), matched.objects.tolist())
        if (things[thing] >= 0).sum() >= least
        and layer_iou([cut[-1].mask_logits[0, query, None], things[thing, None]])[0] >= 0.5
    ]
    if not pairs:
        return None
    ious = {pair: layer_iou([h.mask_logits[0, pair[0], None] for h in cut]) for pair in pairs}
    query, thing = min(pairs, key=lambda pair: sum(ious[pair]))
    name = model.classes.names[int(target.labels[thing])]
    full_size = View(None, target.masks[thing][None].float() - 0.5, sizes)
    grey = np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)  # only the mask has colour
    tiles, titles = [], []
    for number, head in zip(layer_numbers(heads, model.config), heads):
        logits = view_of(head, sizes).upsampler(torch.tensor([query], device=device))
        mask = (logits(slice(0, sizes.original[0]))[0] >= 0).cpu().numpy()
        tiles.append(overlay(grey, [mask], [0], _HIGHLIGHT, captions=False))
        iou = f", IoU {ious[query, thing][len(tiles) - 2]:.2f}" if len(tiles) > 1 else ""
        titles.append(f"layer {number}{iou}" if number else "before layer 1")
    truth = (full_size.upsampler()(slice(0, sizes.original[0]))[0] >= 0).cpu().numpy()
    tiles.append(overlay(grey, [truth], [0], _HIGHLIGHT, captions=False))
    titles.append(f"ground truth: {name}")
    return side_by_side(tiles, titles, columns=columns)
