"""Pictures of a data set: its images with their masks, and training samples as the model sees them."""

from __future__ import annotations

import numpy as np

from mpformer.data.catalog import Catalog
from mpformer.data.images import load_image
from mpformer.data.masks import record_masks
from mpformer.draw import overlay, side_by_side
from mpformer.types import Batch, ClassTable, InputError


def catalog_sheet(catalog: Catalog, count: int = 16, columns: int = 4) -> np.ndarray:
    """Images spread evenly over a split with their masks drawn, [h,w,3] uint8; those with objects first.

    What cannot be read is left out: `check` lists it.
    """
    order = np.linspace(0, len(catalog) - 1, min(len(catalog), 4 * count)).astype(int)
    pictures, titles, bare = [], [], []
    for index in dict.fromkeys(order.tolist()):
        record = catalog.records[index]
        try:
            if record.problem:
                raise InputError(record.problem)
            image, masks = load_image(record), record_masks(record)
        except InputError:
            continue
        if not len(masks):
            bare.append((image, record.image_id))
            continue
        pictures.append(overlay(image, list(masks), [s.label for s in record.segments], catalog.classes))
        titles.append(record.image_id)
        if len(pictures) == count:
            break
    for image, name in bare[: count - len(pictures)]:
        pictures.append(image)
        titles.append(name)
    if not pictures:
        raise InputError(f"{catalog.name}: no image can be read")
    return side_by_side(pictures, titles, columns=min(columns, len(pictures)))


def batch_pictures(batch: Batch, classes: ClassTable) -> list[np.ndarray]:
    """Each sample of a batch with its masks drawn, [h,w,3] uint8, as the model gets it: padding and all."""
    pictures = []
    for image, target in zip(batch.images, batch.targets):
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        pictures.append(overlay(pixels, list(target.masks.numpy()), target.labels.tolist(), classes))
    return pictures
