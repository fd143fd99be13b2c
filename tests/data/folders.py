"""Small COCO folders to test on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mpformer.config import Data, DataSet, LargeScaleJitter, Split

CATEGORIES = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 7, "name": "dog", "isthing": 1}]
SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 25.0, 10.0, 25.0]


def photograph(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth colourful image [h,w,3] uint8 RGB."""
    random = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(random.random((height, width, 3)), (0, 0), 6)
    noise -= noise.min()
    return (255 * noise / noise.max()).astype(np.uint8)


def annotation(identity: int, image_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "image_id": image_id,
        "category_id": 3,
        "segmentation": [SQUARE],
        "area": 300.0,
        "iscrowd": 0,
        **changes,
    }


def coco_folder(
    root: Path,
    annotations: list[dict[str, Any]] | None = None,
    images: int = 4,
    image_changes: dict[int, dict[str, Any]] | None = None,
    content: dict[str, Any] | None = None,
) -> Data:
    """A folder of images 1..n of 60x40 pixels, one square in each unless annotations are given.

    `content` replaces keys of the JSON; None removes one.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(1, images + 1):
        name = f"{number}.png"
        cv2.imwrite(str(root / "images" / name), photograph(seed=number)[..., ::-1])
        image = {"id": number, "file_name": name, "width": 60, "height": 40}
        listed.append({**image, **(image_changes or {}).get(number, {})})
    if annotations is None:
        annotations = [annotation(10 + number, number) for number in range(1, images + 1)]
    whole = {"images": listed, "annotations": annotations, "categories": CATEGORIES, **(content or {})}
    whole = {key: value for key, value in whole.items() if value is not None}
    (root / "train.json").write_text(json.dumps(whole))
    split = Split(images="images", annotations="train.json")
    return Data(
        root=str(root),
        dataset=DataSet(name="small", train=split, val=split),
        augment=LargeScaleJitter(size=(64, 96)),
        loader="inline",
    )
