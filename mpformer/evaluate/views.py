"""Inference of an image at one or several scales, with or without horizontal flip (test-time augmentation).

The first view is the reference: not flipped, at the scale nearest to 1. Instances come from it alone, as in
the papers. Panoptic results need the queries of all views in one order; the official code has no multi-scale
panoptic inference, so the rule is ours: each view's queries are assigned one to one to those of the
reference by the overlap of their masks (dice) plus the agreement of their class probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config import Evaluate, TestResize
from mpformer.data.augment import resize_image, test_size
from mpformer.data.images import PAD_COLOR
from mpformer.data.masks import Window
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.model.matcher import most_alike
from mpformer.types import STRIDE, Head, round_up

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture


def prepare(image: np.ndarray, resize: TestResize, scale: float = 1.0) -> tuple[Tensor, Sizes]:
    """The network input [1,3,H,W] uint8 of an image [h,w,3] uint8 RGB, resized and padded, and its sizes."""
    h, w = image.shape[:2]
    height, width = (max(1, round(edge * scale)) for edge in test_size(h, w, resize))
    resized = resize_image(image, Window(0, 0, w, h, width, height))
    padded = (round_up(height, STRIDE), round_up(width, STRIDE))
    return _padded(resized, padded), Sizes(padded, (height, width), (h, w))


def prepare_within(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The network input [1,3,H,W] uint8 of one size for an image [h,w,3] uint8 RGB.

    The image lies in the upper left corner, as large as fits with its aspect kept; the rest is padding.
    """
    h, w = image.shape[:2]
    scale = min(size[0] / h, size[1] / w)
    height, width = max(1, round(h * scale)), max(1, round(w * scale))
    return _padded(resize_image(image, Window(0, 0, w, h, width, height)), size)


def _padded(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    canvas = np.empty((*size, 3), np.uint8)
    canvas[:] = PAD_COLOR
    canvas[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas).permute(2, 0, 1)[None].contiguous()


def forward(model: Architecture, images: Tensor, all_heads: bool = False) -> tuple[Head, ...]:
    """The model's heads, last one last. Switches the model to evaluation mode."""
    if model.training:
        model.eval()
    return model(images, all_heads=all_heads).heads


def view_of(head: Head, sizes: Sizes, flipped: bool = False) -> View:
    """The view that a head of one image (a batch of one) gives."""
    class_logits = None if head.class_logits is None else head.class_logits[0]
    return View(class_logits, head.mask_logits[0], sizes, flipped)


def predict_views(
    model: Architecture,
    images: Sequence[np.ndarray],
    resize: TestResize,
    options: Evaluate,
    device: torch.device,
    *,
    all_heads: bool = False,
) -> list[tuple[list[View], tuple[Head, ...]]]:
    """For each image [h,w,3] uint8 RGB its views, the reference first, and the heads of the reference.

    `options.scales` and `flip` choose the views. The images have one size and form one batch per view.
    """
    reference_scale = min(options.scales, key=lambda s: abs(s - 1))
    others = [
        (scale, flipped)
        for scale in options.scales
        for flipped in ((False, True) if options.flip else (False,))
        if flipped or scale != reference_scale
    ]

    def heads_of(scale: float, flipped: bool, all_heads: bool) -> tuple[list[tuple[Head, ...]], Sizes]:
        inputs = [np.ascontiguousarray(i[:, ::-1]) if flipped else i for i in images]
        prepared = [prepare(image, resize, scale) for image in inputs]
        batch = torch.cat([tensor for tensor, _ in prepared])
        heads = forward(model, batch.to(device), all_heads)
        return [tuple(_of_image(head, b) for head in heads) for b in range(len(images))], prepared[0][1]

    first, sizes = heads_of(reference_scale, False, all_heads)
    predicted = [([view_of(heads[-1], sizes)], heads) for heads in first]
    for scale, flipped in others:
        more, sizes = heads_of(scale, flipped, False)
        for (views, _), heads in zip(predicted, more):
            views.append(view_of(heads[-1], sizes, flipped))
    return predicted


def _of_image(head: Head, index: int) -> Head:
    """The head of one image of the batch, as a batch of one."""
    one = slice(index, index + 1)
    class_logits = None if head.class_logits is None else head.class_logits[one]
    boxes = None if head.boxes is None else head.boxes[one]
    return Head(class_logits, head.mask_logits[one], boxes)


def align_queries(views: Sequence[View]) -> list[View]:
    """The views with their queries in the order of the reference; see the module's docstring."""
    reference = views[0]
    if len(views) == 1 or reference.class_logits is None:
        return list(views)
    size = _valid_cells(reference.sizes)
    masks, classes = _masks_at(reference, size), reference.class_probabilities()
    result = [reference]
    for view in views[1:]:
        others = _masks_at(view, size)
        overlap = 2 * masks @ others.T / (masks.sum(1, keepdim=True) + others.sum(1) + 1e-6)
        order = most_alike(overlap + classes @ view.class_probabilities().T)
        result.append(view.reordered(order))
    return result


def _valid_cells(sizes: Sizes) -> tuple[int, int]:
    """(height, width) in cells of stride 4 of the input without padding, rounded up."""
    height, width = sizes.valid
    return -(-height // 4), -(-width // 4)


def _masks_at(view: View, size: tuple[int, int]) -> Tensor:
    """Mask probabilities [Q,h*w] of the image without padding, resized to `size` and unflipped."""
    height, width = _valid_cells(view.sizes)
    logits = view.mask_logits[None, :, :height, :width].float()
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    return (logits.flip(2) if view.flipped else logits).sigmoid().flatten(1)
