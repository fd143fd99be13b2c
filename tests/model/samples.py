"""Models small enough for quick tests, and ground truth for them."""

import numpy as np
import torch

from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.architecture import Structure
from mpformer.model.matcher import Match
from mpformer.model.objects import Objects, in_a_row
from mpformer.model.pairs import Pairs, tabulate
from mpformer.model.piloting import make_pilots, plan_pilots
from mpformer.model.segmenter import structure_of
from mpformer.model.streams import SampleRandom
from mpformer.types import Batch, Pilots, Target

CPU = torch.device("cpu")


def tiny_model(pilot: dict | None = None, loss: dict | None = None, decoder: dict | None = None) -> Model:
    """A ResNet of four blocks, 16 channels, four decoder layers, 7 queries."""
    return Model(
        backbone=Backbone(name="test_resnet", pretrained=None, norm="group_norm"),
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


def draws_of(images: int, seed: int = 0) -> SampleRandom:
    """Random numbers for images at the first positions."""
    return SampleRandom(seed, range(images), CPU)


def pilots_for(
    targets: list[Target],
    config: Model,
    draws: SampleRandom | None = None,
    classes: int = 3,
    structure: Structure | None = None,
) -> Pilots | None:
    """The pilots of these images for a model of these settings (or of that structure)."""
    objects, draws = in_a_row(targets), draws or draws_of(len(targets))
    plan = plan_pilots(objects, config.pilot, draws)
    structure = structure or structure_of(config, classes)
    return plan and make_pilots(plan, objects, config.pilot, structure, draws)


def pairs_of(matches: list[Match], objects: Objects, draws: SampleRandom | None = None) -> Pairs:
    """The pairs of one head, given those of each image, with the points of their objects."""
    images = np.repeat(np.arange(len(matches)), [len(m.queries) for m in matches])
    queries = np.concatenate([m.queries.numpy() for m in matches])
    own = np.concatenate([m.objects.numpy() + start for m, start in zip(matches, objects.starts)]).astype(int)
    drawn = (draws or draws_of(len(matches))).rows("losses", images, objects.numbers[own], 0)
    table = np.stack((np.zeros_like(images), images, queries, own, np.arange(len(own))))
    return tabulate(table, 1, drawn, CPU)


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
