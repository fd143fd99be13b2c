"""A generated data set in COCO's layout: textured shapes that overlap on a few kinds of ground.

Countable shapes (disk, box, triangle, star) lie on stuff (sky, grass, water); shapes occlude those below
them, as in photographs. Whole shapes are written as polygons, partly occluded ones as run lengths, and
occasionally a group of small ones as a crowd. An image is a function of (seed, split, number).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from mpformer import atomic
from mpformer.data.augment import generator
from mpformer.data.masks import run_lengths, segment_mask
from mpformer.data.records import Polygons, Record, Segment
from mpformer.types import InputError

_MARKER = "synthetic.json"
_VERSION = 2
"""Changes with what is drawn, so that an outdated folder is recognised."""

# name, id at the source (with gaps, as in COCO), hue in degrees, colour in panoptic pictures
_THINGS = (
    ("disk", 1, 5.0, (220, 20, 60)),
    ("box", 2, 265.0, (119, 11, 232)),
    ("triangle", 4, 45.0, (250, 170, 30)),
    ("star", 5, 315.0, (250, 0, 230)),
)
_STUFF = (
    ("sky", 11, 210.0, (70, 130, 180)),
    ("grass", 12, 110.0, (107, 142, 35)),
    ("water", 14, 185.0, (0, 80, 100)),
)
_CATEGORIES = [
    {"id": source_id, "name": name, "isthing": int(i < len(_THINGS)), "color": list(color)}
    for i, (name, source_id, _, color) in enumerate((*_THINGS, *_STUFF))
]


def generate(
    out: Path, images: Mapping[str, int] | None = None, seed: int = 0, size: int = 128, things: int = 5
) -> bool:
    """Write the data set into `out`; False if it is there already, made with the same arguments.

    `images` counts those of each split (default: 400 train, 60 val), `size` is their width and height in
    pixels, `things` the most objects of an image (at least 2 are tried). The layout is COCO's: train2017/,
    val2017/, annotations/ with instances_*.json, panoptic_*.json and panoptic_*/, and semantic_*/ with
    contiguous labels. Raises `InputError` for a folder that holds something else, other arguments included.
    """
    images = dict(images or {"train": 400, "val": 60})
    if size < 32 or things < 2 or min(images.values(), default=0) < 1:
        raise InputError("synthetic data: size of at least 32, 2 things and 1 image per split are expected")
    arguments = {"version": _VERSION, "images": images, "seed": seed, "size": size, "things": things}
    marker = out / _MARKER
    if marker.is_file():
        state = json.loads(marker.read_text())
        if state["arguments"] != arguments:
            raise InputError(
                f"{out}: holds generated data of other arguments {state['arguments']}; name another folder"
            )
        if state["complete"]:
            return False
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: the folder holds other files; an empty or new one is expected")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(marker, {"arguments": arguments, "complete": False})
    for split, count in images.items():
        _write_split(out, split, count, seed, size, things)
    _write_json(marker, {"arguments": arguments, "complete": True})
    return True


def arguments_of(root: Path) -> dict[str, Any] | None:
    """The arguments that a folder's data set was generated with, and its version; None for other folders."""
    marker = root / _MARKER
    return json.loads(marker.read_text())["arguments"] if marker.is_file() else None


# --- scenes ---------------------------------------------------------------------------------------


@dataclass
class _Thing:
    label: int
    outline: np.ndarray
    """[n,2] float64 (x, y)."""
    whole: np.ndarray
    """[h,w] bool, occluded parts included."""
    visible: np.ndarray
    color: np.ndarray
    crowd: bool = False


def _draw_scene(random: Generator, size: int, most: int) -> tuple[np.ndarray, np.ndarray, list[_Thing]]:
    """(image [h,w,3] uint8, stuff index [h,w], things from the bottom to the top)."""
    stuff = _ground(random, size)
    image = np.empty((size, size, 3), np.float32)
    for index, (_, _, hue, _) in enumerate(_STUFF):
        where = stuff == index
        if where.any():
            image[where] = _ground_texture(random, size, index, hue)[where]
    things: list[_Thing] = []
    if random.random() < 0.06:
        things.append(_swarm(random, size))
    wanted = len(things) + 2 + int(random.random() * (most - 1))
    for _ in range(4 * most):  # a place may be refused; crowded scenes end with fewer
        if len(things) == wanted:
            break
        thing = _thing(random, size)
        left = [t.visible & ~thing.whole for t in things]
        if all(v.sum() >= 0.35 * t.whole.sum() for v, t in zip(left, things)):
            for other, visible in zip(things, left):
                other.visible = visible
            things.append(thing)
    for thing in things:
        image[thing.visible] = _thing_texture(random, size, thing)[thing.visible]
    image += (_uniform(random, (size, size, 1)) - 0.5) * 14
    return np.clip(image, 0, 255).astype(np.uint8), stuff, things


def picture(size: int, seed: int = 0) -> np.ndarray:
    """One generated image, [size,size,3] uint8 RGB, without its ground truth."""
    return _draw_scene(generator(seed, 0, "picture"), size, 5)[0]


def _ground(random: Generator, size: int) -> np.ndarray:
    x = np.arange(size) / size
    y = np.arange(size)[:, None] / size

    def wavy(height: float) -> np.ndarray:
        phase, waves, depth = random.random() * 6.28, 1 + 2 * random.random(), 0.05 * random.random()
        return height + depth * np.sin(phase + 6.28 * waves * x)

    stuff = np.where(y < wavy(0.2 + 0.5 * random.random()), 0, 1)
    if (
        random.random() < 0.6
    ):  # water below a second line or, when it lies above the first, right under the sky
        shore = wavy(0.45 + 0.5 * random.random())
        stuff = np.where((stuff == 1) & (y > shore), 2, stuff)
    return stuff


def _ground_texture(random: Generator, size: int, index: int, hue: float) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    base = _rgb(hue + 16 * (random.random() - 0.5), 0.35, 0.6 + 0.25 * random.random())
    if index == 0:
        light = 25 * (0.5 - y)
    elif index == 1:
        light = 45 * (_blurred(random, size, 1.0) - 0.5) * 3
    else:
        light = 18 * np.sin(6.28 * (y * (6 + 6 * random.random()) + 0.4 * np.sin(9 * x)))
    return base + light[..., None] + 30 * (_blurred(random, size, size / 12)[..., None] - 0.5)


def _thing(random: Generator, size: int) -> _Thing:
    label = int(random.random() * len(_THINGS))
    radius = size * (0.07 + 0.2 * random.random() ** 1.5)
    center = size * (0.05 + 0.9 * _uniform(random, 2))
    outline = _clipped(center + radius * _shape(random, label), size)
    whole = _rasterised(outline, size)
    if whole.sum() < 12:  # nearly all of it lies outside
        return _thing(random, size)
    return _Thing(label, outline, whole, whole, _thing_color(random, label))


def _clipped(outline: np.ndarray, size: int) -> np.ndarray:
    """The part of a polygon inside the image, cut side by side of the image (Sutherland and Hodgman)."""
    for axis in (0, 1):
        for sign, limit in ((1.0, 0.0), (-1.0, -float(size))):
            kept: list[np.ndarray] = []
            for a, b in zip(outline, np.roll(outline, -1, 0)):
                inside_a, inside_b = sign * a[axis] >= limit, sign * b[axis] >= limit
                if inside_a:
                    kept.append(a)
                if inside_a != inside_b:
                    share = (limit * sign - a[axis]) / (b[axis] - a[axis])
                    kept.append(a + share * (b - a))
            outline = np.array(kept).reshape(-1, 2)
    return outline


def _swarm(random: Generator, size: int) -> _Thing:
    label = int(random.random() * len(_THINGS))
    center = size * (0.2 + 0.6 * _uniform(random, 2))
    whole = np.zeros((size, size), bool)
    for _ in range(6):
        spot = center + size * 0.3 * (_uniform(random, 2) - 0.5)
        whole |= _rasterised(spot + size * 0.035 * _shape(random, label), size)
    return _Thing(label, np.empty((0, 2)), whole, whole, _thing_color(random, label), crowd=True)


def _shape(random: Generator, label: int) -> np.ndarray:
    """An outline of about unit radius, turned at random."""
    name = _THINGS[label][0]
    turn = 6.283 * random.random()
    if name == "disk":
        angles, radii = np.linspace(0, 6.283, 33)[:-1], np.ones(32)
    elif name == "box":
        half = 0.5 + 0.35 * random.random()
        angles, radii = np.array([half, 3.1416 - half, 3.1416 + half, -half]), np.full(4, 1.1)
    elif name == "triangle":
        angles, radii = np.linspace(0, 6.283, 4)[:-1] + 0.5 * (_uniform(random, 3) - 0.5), np.full(3, 1.2)
    else:
        angles, radii = np.linspace(0, 6.283, 11)[:-1], np.tile([1.25, 0.55], 5)
    return np.stack([radii * np.cos(angles + turn), radii * np.sin(angles + turn)], 1)


def _thing_color(random: Generator, label: int) -> np.ndarray:
    # the hues of the classes overlap, so that a colour hints at the class but only the shape decides it
    hue = _THINGS[label][2] + 120 * (random.random() - 0.5)
    return _rgb(hue, 0.65 + 0.3 * random.random(), 0.6 + 0.35 * random.random())


def _thing_texture(random: Generator, size: int, thing: _Thing) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    turn, waves = 6.283 * random.random(), 8 + 14 * random.random()
    along = x * np.cos(turn) + y * np.sin(turn)
    pattern = int(random.random() * 3)
    if pattern == 0:
        light = 60 * (along - along[thing.visible].mean())
    elif pattern == 1:
        light = 22 * np.sign(np.sin(6.283 * waves * along))
    else:
        light = 120 * (_blurred(random, size, size / 40) - 0.5)
    edge = thing.visible & ~cv2.erode(thing.visible.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
    return (thing.color + light[..., None]) * np.where(edge, 0.7, 1.0)[..., None]


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    hsv = np.array([[[hue % 360, saturation, value]]], np.float32)
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def _uniform(random: Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    return random.random(shape)


def _blurred(random: Generator, size: int, sigma: float) -> np.ndarray:
    """Smooth noise [size,size] with mean 0.5 and values of about 0..1."""
    noise = cv2.GaussianBlur(_uniform(random, (size, size)), (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return 0.5 + (noise - noise.mean()) / (6 * noise.std())


def _rasterised(outline: np.ndarray, size: int) -> np.ndarray:
    if len(outline) < 3:
        return np.zeros((size, size), bool)
    record = Record("", "", size, size, ())
    return segment_mask(Segment(0, False, Polygons((outline,)), 0.0, 0), record)


# --- files ----------------------------------------------------------------------------------------


def _write_split(out: Path, split: str, count: int, seed: int, size: int, most: int) -> None:
    name = f"{split}2017"
    folders = {
        "image": out / name,
        "panoptic": out / "annotations" / f"panoptic_{name}",
        "semantic": out / f"semantic_{name}",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for number in range(count):
        image, stuff, things = _draw_scene(generator(seed, number, split, "synthetic"), size, most)
        image_id = number + 1
        stem = f"{image_id:012d}"
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "width": size, "height": size})
        for thing in things:
            instances.append(_instance(thing, len(instances) + 1, image_id))
        ids, labels, segments = _panoptic(stuff, things)
        panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
        bgr = [ids >> 16, ids >> 8 & 255, ids & 255]
        _write_image(folders["image"] / f"{stem}.jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        _write_image(folders["panoptic"] / f"{stem}.png", np.stack(bgr, 2).astype(np.uint8))
        _write_image(folders["semantic"] / f"{stem}.png", labels.astype(np.uint8))
    common = {"info": {"description": "generated by mpformer data synth"}, "images": images}
    thing_categories = [c for c in _CATEGORIES if c["isthing"]]
    annotations = out / "annotations"
    _write_json(
        annotations / f"instances_{name}.json",
        {**common, "annotations": instances, "categories": thing_categories},
    )
    _write_json(
        annotations / f"panoptic_{name}.json",
        {**common, "annotations": panoptic, "categories": _CATEGORIES},
    )


def _instance(thing: _Thing, identity: int, image_id: int) -> dict[str, Any]:
    hidden = thing.visible.sum() < thing.whole.sum()
    if thing.crowd or hidden:
        segmentation: Any = run_lengths(thing.visible, compressed=not thing.crowd)
    else:
        segmentation = [thing.outline.ravel().tolist()]
    return {
        "id": identity,
        "image_id": image_id,
        "category_id": _CATEGORIES[thing.label]["id"],
        "segmentation": segmentation,
        "area": int(thing.visible.sum()),
        "bbox": list(cv2.boundingRect(thing.visible.view(np.uint8))),
        "iscrowd": int(thing.crowd),
    }


def _panoptic(stuff: np.ndarray, things: list[_Thing]) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(ids [h,w] int32, contiguous labels [h,w], segments_info)."""
    ids = np.zeros(stuff.shape, np.int32)
    labels = stuff + len(_THINGS)
    for index in range(len(_STUFF)):
        ids[stuff == index] = (len(_THINGS) + index + 1) << 16
    segments = {(len(_THINGS) + i + 1) << 16: (len(_THINGS) + i, False) for i in range(len(_STUFF))}
    for number, thing in enumerate(things, 1):
        identity = (thing.label + 1) << 16 | number << 8
        ids[thing.visible] = identity
        labels[thing.visible] = thing.label
        segments[identity] = (thing.label, thing.crowd)
    listed = []
    for identity, (label, crowd) in segments.items():
        pixels = ids == identity
        if pixels.any():
            listed.append(
                {
                    "id": identity,
                    "category_id": _CATEGORIES[label]["id"],
                    "area": int(pixels.sum()),
                    "bbox": list(cv2.boundingRect(pixels.view(np.uint8))),
                    "iscrowd": int(crowd),
                }
            )
    return ids, labels, listed


def _write_image(path: Path, pixels: np.ndarray, parameters: list[int] | None = None) -> None:
    whole, encoded = cv2.imencode(path.suffix, np.ascontiguousarray(pixels), parameters or [])
    if not whole:
        raise InputError(f"{path}: cv2 cannot encode this kind of image")
    path.write_bytes(encoded.tobytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(content))
