"""Collate samples into a `PackedBatch`: the one step of the data part that makes tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpformer.data.images import PAD_COLOR
from mpformer.data.samples import Sample
from mpformer.types import PackedBatch, PackedTarget


def collate(samples: Sequence[Sample], canvas: tuple[int, int]) -> PackedBatch:
    """A batch of samples on a canvas (height, width): images padded with `PAD_COLOR`, masks packed.

    Empty `samples` make an empty batch.
    """
    height, width = canvas
    images = np.empty((len(samples), 3, height, width), np.uint8)
    for out, sample in zip(images, samples):
        h, w = sample.image.shape[1:]
        out[:, :h, :w] = sample.image
        for plane, mean in zip(out, PAD_COLOR):
            plane[h:] = mean
            plane[:h, w:] = mean
    return PackedBatch(
        images=torch.from_numpy(images),
        targets=tuple(_target(s, canvas) for s in samples),
        valid_sizes=tuple((s.image.shape[1], s.image.shape[2]) for s in samples),
        image_ids=tuple(s.image_id for s in samples),
        positions=tuple(s.position for s in samples),
        skipped=tuple(s.skipped for s in samples if s.skipped),
    )


def _target(sample: Sample, canvas: tuple[int, int]) -> PackedTarget:
    height, width = canvas
    masks = np.zeros((len(sample.labels), height, width // 8), np.uint8)
    packed = np.frombuffer(sample.bits, np.uint8)
    offset = 0
    for out, (x, y, w, h) in zip(masks, sample.boxes.tolist()):
        end = offset + h * w // 8
        out[y : y + h, x // 8 : (x + w) // 8] = packed[offset:end].reshape(h, w // 8)
        offset = end
    return PackedTarget(torch.from_numpy(sample.labels.astype(np.int64)), torch.from_numpy(masks))
