"""Data sets in the layouts of the example readers, drawn here so that every pixel's truth is known."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = 64
DISC, BLOB = (200, 40, 40), (40, 40, 200)


def _polygon(random: np.random.Generator, corners: int) -> np.ndarray:
    """[corners,2] (x, y) in 0..1."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return random.uniform(0.3, 0.7, 2) + 0.22 * np.stack([np.cos(angles), np.sin(angles)], 1)


def yolo(root: Path, images: dict[str, int]) -> None:
    """`images/`, `labels/`, `data.yaml`: two polygons per image, one of each class."""
    random = np.random.default_rng(0)
    for split, count in images.items():
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = np.full((SIZE, SIZE, 3), 90, np.uint8)
            lines = []
            for label, color in enumerate((DISC, BLOB)):
                points = _polygon(random, 12)
                cv2.fillPoly(image, [np.int32(points * SIZE)], color)
                lines.append(" ".join([str(label), *(f"{v:.4f}" for v in points.ravel())]))
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
            (root / "labels" / split / f"{number}.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{split}: images/{split}" for split in images]
    (root / "data.yaml").write_text("\n".join([*lines, "names: {0: disc, 1: blob}", "nc: 2"]) + "\n")


def voc(root: Path, images: dict[str, int]) -> None:
    """Two rectangles per image: a cat, and a dog that is difficult; a line of void pixels around each."""
    random = np.random.default_rng(1)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, count in images.items():
        names = [f"{split}_{number}" for number in range(count)]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            objects, classes = (np.zeros((SIZE, SIZE), np.uint8) for _ in range(2))
            items = []
            for number, (kind, value, difficult) in enumerate((("cat", 8, 0), ("dog", 12, 1)), 1):
                x = 2 + (number - 1) * SIZE // 2
                y, width, height = (int(v) for v in random.integers((2, 10, 10), (20, 26, 40)))
                for ids, inside in ((objects, number), (classes, value)):
                    ids[y - 1 : y + height + 1, x - 1 : x + width + 1] = 255
                    ids[y : y + height, x : x + width] = inside
                sides = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height))
                box = "".join(f"<{side}>{at}</{side}>" for side, at in sides)
                items.append(
                    f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
                )
            size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
            text = f"<annotation>{size}{''.join(items)}</annotation>"
            (root / "Annotations" / f"{name}.xml").write_text(text)
            Image.fromarray(np.repeat(objects[..., None] * 40, 3, 2)).save(
                root / "JPEGImages" / f"{name}.jpg"
            )
            for folder, ids in (("SegmentationObject", objects), ("SegmentationClass", classes)):
                picture = Image.fromarray(ids, "P")
                picture.putpalette(list(np.random.default_rng(2).integers(0, 256, 768)))
                picture.save(root / folder / f"{name}.png")
