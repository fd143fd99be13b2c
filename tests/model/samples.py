"""Models small enough for quick tests, and ground truth for them."""

import torch

from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.streams import SampleRandom
from mpformer.types import Target

CPU = torch.device("cpu")


def tiny_model(pilot: dict | None = None, loss: dict | None = None, decoder: dict | None = None) -> Model:
    """ResNet-18, 16 channels, four decoder layers, 7 queries."""
    return Model(
        backbone=Backbone(name="resnet18", pretrained=None, norm="group_norm"),
        pixel_decoder=PixelDecoder(channels=16, layers=1, heads=2, ffn=16),
        decoder=Decoder(**{"layers": 4, "queries": 7, "heads": 2, "ffn": 16, **(decoder or {})}),
        pilot=Pilot(**{"queries": 12, **(pilot or {})}),
        loss=Loss(**{"points": 48, **(loss or {})}),
    )


def blobs(count: int, size: tuple[int, int] = (64, 96), seed: int = 0, classes: int = 3) -> Target:
    """Random rectangles, some of them a few pixels small."""
    random = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for mask in masks:
        h, w, y, x = (int(torch.randint(0, 1000, (), generator=random)) for _ in range(4))
        h, w = 2 + h % (size[0] // 2), 2 + w % (size[1] // 2)
        y, x = y % (size[0] - h), x % (size[1] - w)
        mask[y : y + h, x : x + w] = True
    return Target(torch.randint(0, classes, (count,), generator=random), masks)


def pilot_draws(images: int, seed: int = 0) -> SampleRandom:
    return SampleRandom(seed, "pilots", range(images), CPU)
