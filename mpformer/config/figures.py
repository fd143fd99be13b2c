"""The figures of an evaluation by name, as settings and studies name them, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mpformer.types import Task

_PRECISION = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_RECALL = ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
_INSTANCE = (*_PRECISION, *(name.replace("AP", "AP_boundary") for name in _PRECISION), *_RECALL)
_PIXELS = ("mIoU", "pixel_accuracy", "class_accuracy")
_QUALITY = ("PQ", "SQ", "RQ")
FIGURES: dict[Task, tuple[str, ...]] = {
    "instance": _INSTANCE,
    "panoptic": (
        *(name + kind for name in _QUALITY for kind in ("", "_things", "_stuff")),
        *_PIXELS,
        *_INSTANCE,
    ),
    "semantic": (*_PIXELS, *(f"{name}_stuff" for name in _QUALITY)),
}
"""What an evaluation of a task measures (`mpformer.evaluate.metrics.score`), as `val/NAME`."""
LOSSES = (
    *("loss", "loss_class", "loss_mask", "loss_dice"),
    *("loss_box", "loss_giou", "loss_pixel", "loss_consistency"),
)
"""What it measures with `evaluate.loss`, too: the sum, and the terms that the model has."""
PLAIN, AVERAGED = "val/", "val_ema/"
"""What the keys of an evaluation's figures begin with: of the weights, and of their average (`train.ema`)."""


def higher_is_better(key: str) -> bool:
    """Whether a larger value of a figure is the better one: of all but losses, such as `val/loss_mask`."""
    return not key.partition("/")[2].startswith("loss")


def ranked(key: str, values: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, value) of a figure, the best first; of equal values the earliest, without what is not finite."""
    sign = -1 if higher_is_better(key) else 1
    finite = (one for one in values if math.isfinite(one[1]))
    return sorted(finite, key=lambda one: (sign * one[1], one[0]))
