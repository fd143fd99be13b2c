"""Pictures of a data set: its images with their masks, and training samples as the model sees them."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from mpformer.data.images import load_image
from mpformer.data.masks import Window, crop_masks
from mpformer.data.records import Catalog, Record
from mpformer.draw import attempted, fitted, overlay, side_by_side
from mpformer.types import Batch, ClassInfo, ClassTable, InputError

_TRUTH_AND_PILOT = ClassTable(
    (ClassInfo("ground truth", 0, True, (225, 40, 40)), ClassInfo("pilot", 1, True, (45, 90, 235)))
)


_TILE = 1448
"""Pixels of the longer side of an image on a sheet."""


def reduced(record: Record, longest: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The record's image [h,w,3] uint8 RGB and a mask [h,w] bool of each segment, at most `longest` large.

    Made for pictures: masks are drawn at this size, so that those of a huge image need little memory.
    """
    height, width = fitted(record.height, record.width, longest)
    image = load_image(record)
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    window = Window(0, 0, record.width, record.height, width, height)
    masks = []
    for box in crop_masks(record, record.segments, window):
        masks.append(np.zeros((height, width), bool))
        if box is not None:
            box_height, box_width = box.pixels.shape
            masks[-1][box.y : box.y + box_height, box.x : box.x + box_width] = box.pixels
    return image, masks


def catalog_sheet(catalog: Catalog, count: int = 16, columns: int = 4, *, side: int = _TILE) -> np.ndarray:
    """Images spread evenly over a split with their masks drawn, [h,w,3] uint8; those with objects first.

    Each is reduced to `side` pixels of its longer side. What cannot be read is left out: `check` lists it.
    """
    order = np.linspace(0, len(catalog) - 1, min(len(catalog), 4 * count)).astype(int)
    pictures, titles, bare = [], [], []
    for index in dict.fromkeys(order.tolist()):
        record = catalog.records[index]
        try:
            if record.problem:
                raise InputError(record.problem)
            image, masks = reduced(record, side)
        except InputError:
            continue
        if not masks:
            bare.append((image, record.image_id))
            continue
        labels = [s.label for s in record.segments]
        captions = len(catalog.classes) > 1
        drawn = attempted(
            lambda: overlay(image, masks, labels, catalog.classes, captions=captions),  # noqa: B023  called here
            f"{catalog.name}: picture of {record.image_id}",
        )
        if drawn is None:
            continue
        pictures.append(drawn)
        titles.append(record.image_id)
        if len(pictures) == count:
            break
    for image, name in bare[: count - len(pictures)]:
        pictures.append(image)
        titles.append(name)
    if not pictures:
        raise InputError(f"{catalog.name}: no image can be read")
    return side_by_side(pictures, titles, columns=min(columns, len(pictures)), longest=side)


def batch_pictures(batch: Batch, classes: ClassTable) -> list[np.ndarray]:
    """Each sample of a batch with its masks drawn, [h,w,3] uint8, as the model gets it: padding and all."""
    pictures = []
    for image, target in zip(batch.images, batch.targets):
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        pictures.append(overlay(pixels, list(target.masks.numpy()), target.labels.tolist(), classes))
    return pictures


def pilot_sheet(
    batch: Batch,
    classes: ClassTable,
    slots: Mapping[int, int],
    objects: np.ndarray,
    labels: np.ndarray,
    layers: Mapping[int, np.ndarray],
    most: int = 6,
) -> np.ndarray | None:
    """One pilot of each sample beside its ground truth, a row for each sample; None without any.

    `slots`: the pilot to show of each sample; `objects`, `labels` [B,P]: what the pilots stand for and the
    classes that they are fed as; `layers`: their attention masks [B,P,h*w] bool by decoder layer, of which
    the first `most` are shown. Red is the ground truth, blue the pilot, drawn cell by cell.
    """
    tiles, titles = [], []
    for b, slot in slots.items():
        height, width = batch.valid_sizes[b]
        image = batch.images[b, :, :height, :width].permute(1, 2, 0).numpy()
        grey = np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)
        target = batch.targets[b]
        whole = target.masks[objects[b, slot]].numpy()
        truth = whole[:height, :width]
        right, fed = int(target.labels[objects[b, slot]]), int(labels[b, slot])
        tiles.append(overlay(grey, [truth], [0], _TRUTH_AND_PILOT, captions=False))
        titles.append(classes.names[right] + ("" if fed == right else f", fed as {classes.names[fed]}"))
        for number, masks in list(layers.items())[:most]:
            stride = round((whole.size / masks.shape[2]) ** 0.5)
            cells = masks[b, slot].reshape(whole.shape[0] // stride, -1).view(np.uint8)
            pilot = cv2.resize(cells, whole.shape[::-1], interpolation=cv2.INTER_NEAREST).view(bool)
            shown = [truth, pilot[:height, :width]]
            tiles.append(overlay(grey, shown, [0, 1], _TRUTH_AND_PILOT, captions=False))
            titles.append(f"layer {number}")
    if not tiles:
        return None
    return side_by_side(tiles, titles, columns=1 + min(most, len(layers)))
