"""A small generated catalog and a tiny model with random weights, for the tests of `evaluate`."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import nn

from mpformer.config import Backbone, Config, Decoder, Model, PixelDecoder, TestResize
from mpformer.data.records import Catalog, Record, Rle, Segment
from mpformer.model.architecture import Architecture, build_model
from mpformer.types import ClassInfo, ClassTable, Head, Output

CLASSES = ClassTable(
    (ClassInfo("disc", 3), ClassInfo("box", 5), ClassInfo("sky", 11, False), ClassInfo("grass", 12, False))
)
DISC, BOX, SKY, GRASS = (220, 60, 50), (60, 60, 200), (120, 190, 230), (60, 140, 70)


def as_rle(mask: np.ndarray) -> Rle:
    return Rle(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def scenes(count: int, seed: int = 0, size: tuple[int, int] = (72, 100)) -> Catalog:
    """Sky above grass, with up to four discs and boxes (one in eight a crowd), as a panoptic partition."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        h, w = size[0] + 3 * (number % 3), size[1] - 5 * (number % 2)  # not all of one size
        horizon = int(rng.integers(h // 4, h // 2))
        ids = np.where(np.arange(h)[:, None] < horizon, 1, 2) * np.ones((h, w), int)
        image = np.where(ids[..., None] == 1, SKY, GRASS).astype(np.uint8)
        labels, crowd = [2, 3], [False, False]
        for _ in range(rng.integers(0, 5)):
            label, r = int(rng.integers(0, 2)), int(rng.integers(6, 18))
            y, x = int(rng.integers(5, h - 5)), int(rng.integers(5, w - 5))
            shape = np.zeros((h, w), np.uint8)
            if label:
                cv2.rectangle(shape, (x - r, y - r), (x + r, y + r), 1, -1)
            else:
                cv2.circle(shape, (x, y), r, 1, -1)
            labels.append(label)
            crowd.append(bool(rng.random() < 1 / 8))
            ids[shape > 0] = len(labels)
            image[shape > 0] = np.clip((DISC, BOX)[label] + rng.normal(0, 12, 3), 0, 255)
        segments = []
        for i, (label, is_crowd) in enumerate(zip(labels, crowd), 1):
            mask = ids == i
            if mask.any():
                segments.append(Segment(label, is_crowd, as_rle(mask), float(mask.sum()), i))
        png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        records.append(Record(f"scene-{number}", png, w, h, tuple(segments)))
    return Catalog("scenes", CLASSES, records, "")


def tiny_config(task: str = "panoptic") -> Config:
    model = Model(
        backbone=Backbone(name="test_resnet", pretrained=None, norm="group_norm"),
        pixel_decoder=PixelDecoder(layers=1, channels=32, heads=4, ffn=32),
        decoder=Decoder(queries=12, layers=3, heads=4, ffn=32),
    )
    config = Config(model=model)
    data = config.data.model_copy(update={"task": task, "test_resize": TestResize(short=96, long=160)})
    options = config.evaluate.model_copy(update={"class_confidence": 0.0, "overlap": 0.2})
    return config.model_copy(update={"data": data, "evaluate": options})


def tiny_model(config: Config, seed: int = 0) -> Architecture:
    torch.manual_seed(seed)
    return build_model(config.model, CLASSES)


class ColourModel(nn.Module):
    """Finds what has a class's colour: a model whose predictions are good, not perfect, and quick.

    Queries 0 to 3 look for the colours of the four classes, query 4 for a disc on the left, query 5 for a
    box on the right, less sure of themselves; query 6 is no object.
    """

    settings = None

    def __init__(self, classes: ClassTable = CLASSES) -> None:
        super().__init__()
        self.classes = classes
        self.colours = nn.Parameter(torch.tensor([DISC, BOX, SKY, GRASS], dtype=torch.float32))

    def forward(self, images: torch.Tensor, pilots: None = None, all_heads: bool = False) -> Output:
        cells = nn.functional.avg_pool2d(images.float(), 4)
        distance = (cells[:, None] - self.colours[None, :, :, None, None]).norm(dim=2)
        masks = (60 - distance) / 8  # [B,4,H/4,W/4]
        half = masks.shape[-1] // 2
        left, right = masks[:, 0].clone(), masks[:, 1].clone()
        left[..., half:] = -9.0
        right[..., :half] = -9.0
        everything = torch.cat([masks, left[:, None], right[:, None], masks[:, :1] * 0 + 1], 1)
        sure = torch.tensor([4.0, 4.0, 5.0, 5.0, 3.0, 3.0, 4.0])
        wanted = torch.tensor([0, 1, 2, 3, 0, 1, 4])
        logits = nn.functional.one_hot(wanted, 5) * sure[:, None]
        return Output((Head(logits.expand(len(images), -1, -1).to(masks), everything),))
