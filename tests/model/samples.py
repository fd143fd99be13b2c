"""Models small enough for quick tests, and ground truth for them."""

import torch

from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.piloting import make_pilots
from mpformer.model.segmenter import structure_of
from mpformer.model.streams import SampleRandom
from mpformer.types import Batch, Pilots, Target

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


def pilots_for(
    targets: list[Target], config: Model, draws: SampleRandom | None = None, classes: int = 3
) -> Pilots | None:
    """The pilots of these images for a model of these settings."""
    return make_pilots(
        targets, config.pilot, structure_of(config, classes), draws or pilot_draws(len(targets))
    )


def batch_of(
    targets: list[Target],
    valid_sizes: list[tuple[int, int]] | None = None,
    size: tuple[int, int] | None = None,
) -> Batch:
    """Ground truth as the losses take it, with black images of `size` (default: that of the masks)."""
    height, width = size or targets[0].masks.shape[1:]
    return Batch(
        torch.zeros(len(targets), 3, height, width, dtype=torch.uint8),
        tuple(targets),
        tuple(valid_sizes or [(height, width)] * len(targets)),
        tuple(map(str, range(len(targets)))),
        tuple(range(len(targets))),
    )
