"""Throughput of the data pipeline on generated images: per stage, against the usual way, through Ray Data.

    python benchmarks/data_pipeline.py [--images 64] [--seconds 10] [--ray] [--objects-300]

Noisy 640x480 JPEGs (quality 90) with 7 polygons of 12 to 48 points each, large-scale jitter to 1024. "The
usual way" are the steps of detectron2's dataset mapper for this augmentation: decode, flip, resize the whole
image, crop and pad, then rasterise every polygon at full size. Both run alternately in one process with one
thread; rates are images per second of CPU time of that process, which other load affects less than wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import cv2
import numpy as np
import psutil
from PIL import Image
from pycocotools import mask as coco_mask

from mpformer.config import Data, DataSet, LargeScaleJitter, Split
from mpformer.data.bench import Throughput, stages, throughput
from mpformer.data.catalog import open_split
from mpformer.data.collate import collate
from mpformer.data.images import PAD_COLOR, load_image, read_bytes
from mpformer.data.packing import from_table, to_table
from mpformer.data.records import Catalog, Record
from mpformer.data.samples import make_sample


def write_folder(root: Path, images: int, objects: int, small: bool = False) -> Data:
    """A COCO folder of noisy images with star-shaped polygons."""
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    listed, annotations = [], []
    height, width = (1024, 1024) if small else (480, 640)
    for number in range(images):
        smooth = cv2.GaussianBlur(random.random((height, width, 3)), (0, 0), 12)
        smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
        image = np.clip(255 * smooth + 14 * random.standard_normal((height, width, 1)), 0, 255)
        path = root / "images" / f"{number}.jpg"
        cv2.imwrite(str(path), image.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        listed.append({"id": number, "file_name": path.name, "width": width, "height": height})
        for _ in range(objects):
            count = int(random.integers(12, 49))
            angles = np.sort(random.random(count)) * 2 * np.pi
            radius = (20 if small else 30 + 120 * random.random()) * (0.6 + 0.4 * random.random(count))
            center = random.random(2) * (width, height)
            points = center + np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": 1.0,
                    "segmentation": [np.clip(points, 0, (width, height)).ravel().round(2).tolist()],
                }
            )
    content = {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "train.json").write_text(json.dumps(content))
    split = Split(images="images", annotations="train.json")
    return Data(root=str(root), dataset=DataSet(train=split, val=split), loader="inline")


# --- the usual way --------------------------------------------------------------------------------


def usual_sample(record: Record, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image [3,1024,1024] uint8 and masks [N,1024,1024] bool by the usual steps, all at full size."""
    image = np.array(Image.open(record.image).convert("RGB"))
    flip = random.random() < 0.5
    if flip:
        image = np.ascontiguousarray(image[:, ::-1])
    scale = (0.1 + 1.9 * random.random()) * min(1024 / record.height, 1024 / record.width)
    height, width = round(record.height * scale), round(record.width * scale)
    image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    x, y = int(random.random() * max(0, width - 1023)), int(random.random() * max(0, height - 1023))
    image = image[y : y + 1024, x : x + 1024]
    canvas = np.empty((1024, 1024, 3), np.uint8)
    canvas[:] = PAD_COLOR
    canvas[: image.shape[0], : image.shape[1]] = image
    masks = []
    for segment in record.segments:
        parts = []
        for part in segment.mask.parts:
            points = part.copy()
            if flip:
                points[:, 0] = record.width - points[:, 0]
            parts.append((points * (width / record.width, height / record.height) - (x, y)).ravel().tolist())
        run_lengths = coco_mask.merge(coco_mask.frPyObjects(parts, 1024, 1024))
        mask = coco_mask.decode(run_lengths).astype(bool)
        if mask.any():
            masks.append(mask)
    stacked = np.stack(masks) if masks else np.zeros((0, 1024, 1024), bool)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)), stacked


# --- measuring ------------------------------------------------------------------------------------


def in_turn(ways: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """Calls per second of CPU time of each way, called alternately, so that load affects both equally."""
    spent: dict[str, float] = defaultdict(float)
    count = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end or count < 20:
        for name, way in ways.items():
            start = time.process_time()
            way(count)
            spent[name] += time.process_time() - start
        count += 1
    return {name: count / total for name, total in spent.items()}


def through_ray(
    data: Data, catalog: Catalog, images: int, cpus: int
) -> tuple[Throughput, float, dict[str, float]]:
    """Throughput of Ray Data with that many CPUs, in batches of 16; peak memory of all processes in GB,
    shared pages counted once; and CPU seconds of each kind of process."""
    import ray

    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        with _Watch() as watch:
            found = throughput(data.model_copy(update={"loader": "ray"}), catalog, 16, images // 16)
        return found, watch.peak / 1e9, watch.spent()
    finally:
        ray.shutdown()


class _Watch:
    """Samples memory of this process and its descendants every second, and sums their CPU time."""

    def __enter__(self) -> _Watch:
        self.peak = 0
        self._cpu: dict[int, tuple[str, float]] = {}
        self._before = self._times()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _processes(self) -> list[psutil.Process]:
        return [psutil.Process(), *psutil.Process().children(recursive=True)]

    def _look(self) -> None:
        while not self._done.wait(1.0):
            held = 0
            for process in self._processes():
                with contextlib.suppress(psutil.Error):
                    held += process.memory_full_info().pss
            self.peak = max(self.peak, held)
            self._cpu |= self._times()

    def _times(self) -> dict[int, tuple[str, float]]:
        found = {}
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = (process.name(), times.user + times.system)
        return found

    def spent(self) -> dict[str, float]:
        """CPU seconds by process name, largest first."""
        spent: dict[str, float] = defaultdict(float)
        for pid, (name, seconds) in self._cpu.items():
            spent[name] += seconds - self._before.get(pid, ("", 0.0))[1]
        return dict(sorted(spent.items(), key=lambda item: -item[1]))


def memory_of_many_objects() -> tuple[float, int]:
    """(growth of the peak memory in MB, objects kept) for one sample of 300 objects, from disk to batch."""
    with tempfile.TemporaryDirectory() as folder:
        whole = LargeScaleJitter(scale=(1.0, 1.0))
        data = write_folder(Path(folder), 1, 300, small=True).model_copy(update={"augment": whole})
        catalog = open_split(data, "train")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batch = collate(from_table(to_table([make_sample(catalog, data, 0, 0)])), data.augment.size)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(
            batch.targets[0].labels
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ray", type=int, metavar="IMAGES", help="also stream this many through Ray Data")
    parser.add_argument("--objects-300", action="store_true", help="only the memory of one crowded sample")
    arguments = parser.parse_args()
    if arguments.objects_300:
        grown, kept = memory_of_many_objects()
        print(f"one sample of 300 objects, {kept} of them kept: peak memory grows by {grown:.0f} MB")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(Path(folder), arguments.images, 7)
        catalog = open_split(data, "train")
        size = np.mean([len(read_bytes(r.image)) for r in catalog.records]) / 1000
        print(f"{arguments.images} JPEGs of {size:.0f} KB, 7 objects each; images per second of CPU time")
        rates = in_turn(
            {
                "mpformer": lambda i: make_sample(catalog, data, 0, i),
                "the usual way": lambda i: usual_sample(
                    catalog.records[i % len(catalog)], np.random.default_rng(i)
                ),
                "decoding alone": lambda i: load_image(catalog.records[i % len(catalog)]),
            },
            arguments.seconds,
        )
        for name, rate in rates.items():
            print(f"  {name:16} {rate:7.1f}")
        print(f"  ratio            {rates['mpformer'] / rates['the usual way']:7.2f}")
        parts = [stage for stage in stages(data, catalog, 96) if stage.name != "whole sample"]
        total = sum(stage.milliseconds for stage in parts)
        print("milliseconds per image and share, file to batch:")
        for stage in parts:
            print(f"  {stage.name:18} {stage.milliseconds:6.2f}  {stage.milliseconds / total:5.1%}")
        if arguments.ray:
            found, peak, spent = through_ray(data, catalog, arguments.ray, 2)
            print(
                f"Ray Data, 2 CPUs, wall clock: {found.images_per_second:.1f} images/s, "
                f"{found.megabytes_per_second:.0f} MB/s, first after {found.first_batch_seconds:.1f} s; "
                f"{found.images_per_second / (2 * rates['mpformer']):.0%} of twice the rate above"
            )
            print(f"peak memory of all processes {peak:.2f} GB; CPU milliseconds per image:")
            for name, seconds in spent.items():
                if seconds > 0.1:
                    print(f"  {name:18} {1000 * seconds / arguments.ray:6.2f}")


if __name__ == "__main__":
    main()
