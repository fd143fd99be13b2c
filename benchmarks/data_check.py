"""`mpformer data check` on a generated data set of COCO's size: wall time, processor time, peak memory.

    python benchmarks/data_check.py [--images 118287] [--folder DIR]

Images are 640x480 JPEGs of about 160 kB, one of 64 pictures with its number behind the end mark; each has
on average seven objects of one polygon with 24 points, about as many as COCO's. A named folder is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

CLASSES = 80
POINTS = 24


def pictures(count: int) -> list[bytes]:
    """Encoded images, smooth with some noise, so that they have the bytes of a photograph."""
    made = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = random.random((12, 16, 3)).astype(np.float32)
        smooth = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC)
        noisy = 255 * smooth + random.normal(0, 9, (480, 640, 3))
        made.append(cv2.imencode(".jpg", noisy.clip(0, 255).astype(np.uint8))[1].tobytes())
    return made


def generate(root: Path, images: int) -> None:
    """Both splits in COCO's layout: `images` for training, a twentieth of it for validation."""
    encoded = pictures(64)
    identity = 0
    for split, count in (("train", images), ("val", max(1, images // 20))):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        listed, annotations = [], []
        random = np.random.default_rng(count)
        angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
        for number in range(1, count + 1):
            name = f"{number:012d}.jpg"
            (folder / name).write_bytes(encoded[number % 64] + f"{split}{number}".encode())
            listed.append({"id": number, "file_name": name, "width": 640, "height": 480})
            for _ in range(int(random.poisson(7))):
                identity += 1
                x, y, r = random.uniform(60, 580), random.uniform(60, 420), random.lognormal(3, 0.6)
                r = min(r, 55.0)
                radii = r * random.uniform(0.7, 1.0, POINTS)
                polygon = (
                    np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1).round(2).ravel()
                )
                points = polygon.reshape(-1, 2)
                area = 0.5 * abs(
                    float(points[:, 0] @ np.roll(points[:, 1], 1) - points[:, 1] @ np.roll(points[:, 0], 1))
                )
                annotations.append(
                    {
                        "id": identity,
                        "image_id": number,
                        "category_id": int(random.integers(1, CLASSES + 1)),
                        "segmentation": [polygon.tolist()],
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        content = {
            "images": listed,
            "annotations": annotations,
            "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary) / "coco"
        if not root.exists():
            start = time.monotonic()
            generate(root, options.images)
            print(f"generated in {time.monotonic() - start:.0f} s")
        size = (root / "annotations" / "instances_train2017.json").stat().st_size
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "mpformer", "data", "check", str(root)],
            cwd=temporary,
            capture_output=True,
            text=True,
        )
        wall = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(done.stdout[-2500:], done.stderr[-2500:], sep="")
        print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
        print(
            f"{options.images} images, annotations {size / 2**20:.0f} MiB: {wall:.0f} s, processor "
            f"{used.ru_utime + used.ru_stime:.0f} s, peak {used.ru_maxrss / 2**20:.2f} GiB, "
            f"exit code {done.returncode}"
        )


if __name__ == "__main__":
    main()
