"""The bench measures what it says: every stage runs, and sizes are those of the arrays."""

import numpy as np
import pytest

from mpformer.data import bench
from mpformer.data.catalog import open_split
from tests.data.folders import coco_folder


@pytest.fixture
def small(tmp_path):
    data = coco_folder(tmp_path)
    return data, open_split(data, "train")


def test_sizes_of_the_stages(small):
    found = {s.name: s for s in bench.stages(*small, images=8)}
    assert list(found) == [
        "record",
        "decode",
        "resize and crop",
        "masks",
        "whole sample",
        "to Arrow",
        "collate",
        "unpack masks",
    ]
    assert found["decode"].megabytes == pytest.approx(60 * 40 * 3 / 1e6)
    assert 64 * 96 * 3 / 1e6 <= found["collate"].megabytes <= 64 * 96 * (3 + 1 / 8) / 1e6
    assert 64 * 96 * 3 / 1e6 <= found["unpack masks"].megabytes <= 64 * 96 * 4 / 1e6
    assert found["whole sample"].milliseconds > 0


def test_throughput_and_text(small, monkeypatch):
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    found = bench.throughput(*small, batch_size=2, steps=5)
    assert (found.images_per_second, found.first_batch_seconds) == (4.0, 2.0)
    assert 8 * 64 * 96 * 3 / 2e6 <= found.megabytes_per_second <= 8 * 64 * 96 * (3 + 1 / 8) / 2e6
    text = bench.bench_text([bench.Stage("decode", 4.0, 0.5)], "ray", found)
    assert np.all(
        [part in text for part in ("decode", "250.0", "125.0", "loader ray: 4.0 images/s", "2.0 s")]
    )
