"""A model small enough to train in milliseconds, and batches for it."""

import pytest
import torch

from mpformer.config import Config
from mpformer.types import Batch, Target


@pytest.fixture
def tiny_config() -> Config:
    return Config.model_validate(
        {
            "model": {
                "backbone": {"name": "test_resnet", "pretrained": None, "norm": "group_norm"},
                "pixel_decoder": {"channels": 16, "layers": 1, "heads": 2, "ffn": 16},
                "decoder": {"layers": 2, "queries": 6, "heads": 2, "ffn": 16},
                "pilot": {"queries": 6},
                "loss": {"points": 64},
            },
            "train": {"lr": 1e-3, "clip_norm": 1.0, "batch_size": 2},
        }
    )


def make_batch(counts: list[int], size: int = 64, classes: int = 3, first: int = 0) -> Batch:
    """One image per entry of `counts`, with that many random rectangles; the images follow from `first`."""
    images, targets = [], []
    for i, count in enumerate(counts):
        random = torch.Generator().manual_seed(first + i)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for mask in masks:
            y, x = torch.randint(0, size * 3 // 4, (2,), generator=random).tolist()
            mask[y : y + size // 4, x : x + size // 4] = True
        labels = torch.randint(0, classes, (count,), generator=random)
        images.append(torch.randint(0, 256, (3, size, size), generator=random, dtype=torch.uint8))
        targets.append(Target(labels, masks))
    positions = tuple(range(first, first + len(counts)))
    return Batch(
        torch.stack(images),
        tuple(targets),
        ((size, size),) * len(counts),
        tuple(f"image-{p}" for p in positions),
        positions,
    )
