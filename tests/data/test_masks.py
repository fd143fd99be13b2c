"""Masks in crops against pycocotools on the moved polygon, and packed catalogs against the records put in."""

import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mpformer.data import masks
from mpformer.data.masks import Window
from mpformer.data.records import MapId, Polygons, Record, Rle, Segment, build_table


def star(random, count, center, radius):
    angles = np.sort(random.random(count)) * 2 * np.pi
    radii = radius * (0.3 + 0.7 * random.random(count))
    return np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], 1)


def pasted(box, height, width):
    full = np.zeros((height, width), bool)
    if box is not None:
        full[box.y : box.y + box.pixels.shape[0], box.x : box.x + box.pixels.shape[1]] = box.pixels
    return full


@pytest.mark.parametrize("seed", range(20))
def test_cropped_polygons_are_pycocotools_masks_of_the_moved_polygon(seed):
    random = np.random.default_rng(seed)
    centers, radii = random.random((2, 2)) * (100, 80), 60 * random.random(2)
    parts = tuple(star(random, random.integers(3, 40), c, r) for c, r in zip(centers, radii))
    x, y, width, height = 11, 7, int(random.integers(20, 80)), int(random.integers(20, 60))
    window = Window(x, y, width, height, int(width * (0.2 + 3 * random.random())), 90)
    record = Record("1", "", 100, 80, (Segment(0, False, Polygons(parts), 1.0, 1),))
    (box,) = masks.crop_masks(record, record.segments, window)
    scale = np.array([window.out_width / width, window.out_height / height])
    moved = [((p - (x, y)) * scale).ravel().tolist() for p in parts]
    truth = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, 90, window.out_width)))
    assert np.array_equal(pasted(box, 90, window.out_width), truth.astype(bool))


def test_objects_outside_the_crop_are_dropped():
    square = np.array([[50.0, 50.0], [70.0, 50.0], [70.0, 70.0], [50.0, 70.0]])
    full = np.zeros((80, 100), np.uint8, order="F")
    full[50:70, 50:70] = 1
    counts = coco_mask.encode(full)["counts"]
    segments = (Segment(0, False, Polygons((square,)), 1.0, 1), Segment(0, False, Rle(counts), 1.0, 2))
    record = Record("1", "", 100, 80, segments)
    for window, seen in (((0, 0, 50, 50), False), ((0, 0, 51, 51), True), ((70, 0, 30, 80), False)):
        for box in masks.crop_masks(record, segments, Window(*window, 40, 40)):
            assert (box is not None) is seen


@pytest.mark.parametrize("out", [(20, 30), (80, 100), (37, 41), (160, 200)])
def test_run_lengths_and_label_maps_take_the_nearest_pixel(out, monkeypatch):
    random = np.random.default_rng(3)
    full = random.random((80, 100)) < 0.4
    counts = coco_mask.encode(np.asfortranarray(full.astype(np.uint8)))["counts"]
    segments = (Segment(0, False, Rle(counts), 1.0, 1), Segment(1, False, MapId(5), 1.0, 5))
    monkeypatch.setattr(masks, "load_ids", lambda record: np.where(full, 5, 9).astype(np.int32))
    record = Record("1", "", 100, 80, segments, label_map="ids.png")
    window = Window(10, 20, 60, 50, out[1], out[0])
    rows = [20 + int((i + 0.5) * 50 / out[0]) for i in range(out[0])]
    columns = [10 + int((j + 0.5) * 60 / out[1]) for j in range(out[1])]
    truth = np.array([[full[r, c] for c in columns] for r in rows])
    for box in masks.crop_masks(record, segments, window):
        assert np.array_equal(pasted(box, *out), truth)


def test_compressed_counts_are_read_as_pycocotools_writes_them():
    random = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray((random.random((31, 47)) < density).astype(np.uint8))
        counts = masks.decompress_counts(coco_mask.encode(mask)["counts"])
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(flat, mask.ravel(order="F"))
        assert masks.compress_counts(counts, 31, 47).counts == coco_mask.encode(mask)["counts"]


def test_a_table_gives_back_the_records_put_in():
    points = np.array([[1.1, 2.2], [3.3, 4.4], [5.5, 6.7], [0.1, 0.2], [7.0, 8.0], [9.0, 1.0], [2.0, 3.0]])
    parts = (points[:3], points[3:])
    segments = (
        Segment(3, False, Polygons(parts), 12.5, 900100000391),
        Segment(0, True, Rle(b"abc12"), 0.0, -1),
        Segment(1, False, MapId(3937500), 7.0, 3937500),
    )
    records = [
        Record("a", "images/a.jpg", 640, 480, segments, "ids/a.png"),
        Record("ü", "images/ü.jpg", 1, 2, ()),
        Record("c", "", 3, 4, segments[:1], None, "is broken"),
    ]
    table = build_table(records, "/data")
    for copy in (table, pickle.loads(pickle.dumps(table, 5))):  # noqa: S301  (what Ray does with it)
        assert len(copy) == 3
        first, second, third = copy
        assert (first.image, first.label_map) == ("/data/images/a.jpg", "/data/ids/a.png")
        assert (second.image_id, second.image, second.segments, second.label_map) == (
            "ü",
            "/data/images/ü.jpg",
            (),
            None,
        )
        assert third.problem == "is broken"
        polygons = first.segments[0].mask.parts
        assert all(np.array_equal(a, b) for a, b in zip(polygons, parts, strict=True))
        assert first.segments[1:] == segments[1:]
        assert (first.segments[0].label, first.segments[0].area) == (3, 12.5)
        assert first.segments[0].id == 900100000391
        assert [r.image_id for r in copy[-2:]] == ["ü", "c"]
    with pytest.raises(IndexError):
        table[3]


def test_a_table_pickles_without_copies():
    record = Record("a", "a.jpg", 640, 480, (Segment(0, False, Polygons((np.ones((500, 2)),)), 1.0, 1),) * 50)
    buffers = []
    head = pickle.dumps(build_table([record] * 20, "/data"), 5, buffer_callback=buffers.append)
    assert sum(b.raw().nbytes for b in buffers) > 20 * 50 * 500 * 16
    assert len(head) < 5000
