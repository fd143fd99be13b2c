"""Shapes whose pixels are known without mpformer, files in which they stand, and what came of them."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from mpformer.data.convert.conversion import Conversion, convert

HEIGHT, WIDTH = 60, 80
CORNERS = [(10, 8), (40, 8), (40, 30), (24, 30), (24, 20), (10, 20)]
"""An L whose corners lie between pixels: its pixels are exact."""


def l_shape(dx: int = 0, dy: int = 0) -> np.ndarray:
    """The pixels of `CORNERS`, moved."""
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[8 + dy : 20 + dy, 10 + dx : 40 + dx] = True
    pixels[20 + dy : 30 + dy, 24 + dx : 40 + dx] = True
    return pixels


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Pixels x0 to x1 - 1 and y0 to y1 - 1."""
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """The pixels whose centres lie in an ellipse."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
    return (along / rx) ** 2 + (across / ry) ** 2 <= 1


def ring_and_dot() -> np.ndarray:
    """A mask with a hole and with two parts."""
    return (ellipse(30, 28, 20, 18) & ~ellipse(32, 27, 9, 7)) | box(66, 40, 74, 55)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Path:
    """An image file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def write_json(path: Path, content: object) -> Path:
    return text(path, json.dumps(content))


def png(mask: np.ndarray, mode: str = "L") -> bytes:
    """A mask as a PNG: grey (L), one bit (1), palette with a transparent 0 (P), or in the alpha (RGBA)."""
    stream = io.BytesIO()
    if mode == "P":
        image = Image.fromarray(mask.astype(np.uint8), "L").convert("P")
        image.putdata(mask.astype(np.uint8).ravel().tolist())
        image.putpalette([0, 0, 0, 255, 255, 255])
        image.save(stream, "PNG", transparency=0, bits=1)
    elif mode == "RGBA":
        pixels = np.full((*mask.shape, 4), 255, np.uint8)
        pixels[..., 3] = mask * 255
        Image.fromarray(pixels, "RGBA").save(stream, "PNG")
    else:
        Image.fromarray(mask).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def png_text(mask: np.ndarray, mode: str = "L", *, packed: bool = False) -> str:
    data = png(mask, mode)
    return base64.b64encode(zlib.compress(data) if packed else data).decode()


def objects(out: Path, split: str = "train") -> dict[str, list[tuple[str, np.ndarray]]]:
    """Class and pixels of each object of each image of a converted split, by pycocotools alone."""
    content = json.loads((out / "annotations" / f"instances_{split}.json").read_text())
    names = {item["id"]: item["name"] for item in content["categories"]}
    found: dict[str, list[tuple[str, np.ndarray]]] = {item["file_name"]: [] for item in content["images"]}
    images = {item["id"]: item for item in content["images"]}
    for item in content["annotations"]:
        image = images[item["image_id"]]
        given = item["segmentation"]
        if isinstance(given, list):
            parts = coco_mask.frPyObjects(given, image["height"], image["width"])
            pixels = coco_mask.decode(coco_mask.merge(parts)).astype(bool)
        else:
            assert given["size"] == [image["height"], image["width"]]
            pixels = coco_mask.decode(given).astype(bool)
        assert item["area"] == pixels.sum()
        assert item["iscrowd"] == 0
        found[image["file_name"]].append((names[item["category_id"]], pixels))
    return found


def only(out: Path, split: str = "train") -> np.ndarray:
    """The pixels of the only object of the only image that has one."""
    [[(_, pixels)]] = [listed for listed in objects(out, split).values() if listed]
    return pixels


def converted(source: Path, out: Path, *settings: str) -> Conversion:
    return convert(source, out, settings)


def noted(done: Conversion, words: str) -> list[str]:
    """The places of the one note whose kind has these words."""
    [kind] = [kind for kind in done.notes.places if words in kind]
    return done.notes.places[kind]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
