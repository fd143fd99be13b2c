"""Predictions of image files: what `predict` computes, in this process or in the actors of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpformer.config import Config
from mpformer.data.images import read_image
from mpformer.draw import attempted, encode_png
from mpformer.evaluate.inference import infer, to_result
from mpformer.evaluate.prediction import Prediction
from mpformer.types import ClassTable, InputError

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture

_LARGEST = 1 << 26
"""Pixels of an image from which on it gets no overlay: each of its masks has as many bytes."""


@dataclass(frozen=True)
class ImageFile:
    """An image and the name of its results."""

    path: str
    name: str


@dataclass(frozen=True)
class FileResult:
    """What became of one file."""

    prediction: Prediction | None = None
    """None where the file cannot be read."""
    overlay: bytes | None = None
    """PNG of the image with all segments of the prediction; None where it cannot be drawn."""
    problem: str = ""
    """Why the file cannot be read, on one line."""


def predict_all(model: Architecture, files: Sequence[ImageFile], config: Config) -> Iterator[FileResult]:
    """The results of the files, in their order, predicted on the model's device.

    Of each `evaluate.batch` consecutive files those of one size are predicted together. Raises
    `InputError` for a task that the model cannot do.
    """
    batch = config.evaluate.batch
    for first in range(0, len(files), batch):
        yield from _predict_group(model, files[first : first + batch], config)


def _predict_group(model: Architecture, files: Sequence[ImageFile], config: Config) -> list[FileResult]:
    results: dict[int, FileResult] = {}
    images: dict[int, np.ndarray] = {}
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, file in enumerate(files):
        try:
            images[index] = read_image(file.path, config.data.bits or 16)
        except InputError as error:
            results[index] = FileResult(problem=str(error))
            continue
        by_size.setdefault(images[index].shape, []).append(index)
    device = next(model.parameters()).device
    for members in by_size.values():
        pixels = [images[index] for index in members]
        found = infer(model, pixels, config.data.task, config.data.test_resize, config.evaluate, device)
        for index, one in zip(members, found):
            prediction = one.compact(files[index].name)
            draw = partial(_overlay, prediction, images[index], model.classes)
            results[index] = FileResult(prediction, attempted(draw, files[index].path))
    return [results[index] for index in range(len(files))]


def _overlay(prediction: Prediction, image: np.ndarray, classes: ClassTable) -> bytes:
    """PNG of the image with its segments; `ValueError` if it is too large."""
    if image.shape[0] * image.shape[1] > _LARGEST:
        raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels are too many for an overlay")
    # what was kept is drawn: the one threshold is that of the prediction
    return encode_png(to_result(prediction, classes).overlay(image, min_score=0.0))
