"""Test-time augmentation: one image seen at several sizes, mirrored or not.

The first view is the reference: unmirrored, at the scale nearest to 1. Instances come from it alone, as in
the papers. Panoptic results need to know which queries of two views are one object; the official code has no
multi-scale panoptic inference, so the rule is ours: each view's queries are assigned one to one to those of
the reference by the overlap of their masks (dice) plus the agreement of their class probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config import Evaluate, TestResize
from mpformer.data.augment import resize_image, test_size
from mpformer.data.images import PIXEL_MEAN
from mpformer.data.masks import Window
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.model.matcher import most_alike
from mpformer.types import STRIDE, Head, round_up

if TYPE_CHECKING:
    from mpformer.model.segmenter import Segmenter


def prepare(image: np.ndarray, resize: TestResize, scale: float = 1.0) -> tuple[Tensor, Sizes]:
    """[h,w,3] uint8 -> the network input [1,3,H,W] uint8, padded with the pixel mean, and its sizes."""
    h, w = image.shape[:2]
    height, width = (max(1, round(edge * scale)) for edge in test_size(h, w, resize))
    resized = resize_image(image, Window(0, 0, w, h, width, height))
    padded = (round_up(height, STRIDE), round_up(width, STRIDE))
    canvas = np.empty((*padded, 3), np.uint8)
    canvas[:] = PIXEL_MEAN
    canvas[:height, :width] = resized
    tensor = torch.from_numpy(canvas).permute(2, 0, 1)[None].contiguous()
    return tensor, Sizes(padded, (height, width), (h, w))


def forward(model: Segmenter, images: Tensor, all_heads: bool = False) -> tuple[Head, ...]:
    """The model's heads, last one last. The model is left in evaluation mode."""
    if model.training:
        model.eval()
    return model(images, all_heads=all_heads).heads


def view_of(head: Head, sizes: Sizes, mirrored: bool = False) -> View:
    """The view of a head of one image (a batch of one)."""
    class_logits = None if head.class_logits is None else head.class_logits[0]
    return View(class_logits, head.mask_logits[0], sizes, mirrored)


def look(
    model: Segmenter,
    images: Sequence[np.ndarray],
    resize: TestResize,
    options: Evaluate,
    device: torch.device,
    *,
    all_heads: bool = False,
) -> list[tuple[list[View], tuple[Head, ...]]]:
    """The views of each image [h,w,3] uint8 RGB that the settings ask for, and the heads of its first one.

    The images, of one size, go through the model together.
    """
    reference_scale = min(options.scales, key=lambda s: abs(s - 1))
    others = [
        (scale, mirrored)
        for scale in options.scales
        for mirrored in ((False, True) if options.flip else (False,))
        if mirrored or scale != reference_scale
    ]

    def heads_of(scale: float, mirrored: bool, all_heads: bool) -> tuple[list[tuple[Head, ...]], Sizes]:
        seen = [np.ascontiguousarray(i[:, ::-1]) if mirrored else i for i in images]
        prepared = [prepare(image, resize, scale) for image in seen]
        batch = torch.cat([tensor for tensor, _ in prepared])
        heads = forward(model, batch.to(device), all_heads)
        return [tuple(_of_image(head, b) for head in heads) for b in range(len(images))], prepared[0][1]

    first, sizes = heads_of(reference_scale, False, all_heads)
    looks = [([view_of(heads[-1], sizes)], heads) for heads in first]
    for scale, mirrored in others:
        more, sizes = heads_of(scale, mirrored, False)
        for (views, _), heads in zip(looks, more):
            views.append(view_of(heads[-1], sizes, mirrored))
    return looks


def _of_image(head: Head, index: int) -> Head:
    """The head of one image of a batch, as a batch of one."""
    one = slice(index, index + 1)
    class_logits = None if head.class_logits is None else head.class_logits[one]
    boxes = None if head.boxes is None else head.boxes[one]
    return Head(class_logits, head.mask_logits[one], boxes)


def aligned(views: Sequence[View]) -> list[View]:
    """The views with their queries in the order of the first one's; see the head of this file."""
    reference = views[0]
    if len(views) == 1 or reference.class_logits is None:
        return list(views)
    size = tuple(-(-edge // 4) for edge in reference.sizes.valid)
    masks, classes = _coarse(reference, size), reference.class_probabilities()
    result = [reference]
    for view in views[1:]:
        theirs = _coarse(view, size)
        overlap = 2 * masks @ theirs.T / (masks.sum(1, keepdim=True) + theirs.sum(1) + 1e-6)
        order = most_alike(overlap + classes @ view.class_probabilities().T)
        result.append(
            replace(view, class_logits=view.class_logits[order], mask_logits=view.mask_logits[order])
        )
    return result


def _coarse(view: View, size: tuple[int, int]) -> Tensor:
    """Mask probabilities [Q,h*w] of the image without padding at a small size, mirrored back."""
    height, width = (-(-edge // 4) for edge in view.sizes.valid)
    logits = view.mask_logits[None, :, :height, :width].float()
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    return (logits.flip(2) if view.mirrored else logits).sigmoid().flatten(1)
