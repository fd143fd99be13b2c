"""Panoptic quality against torchmetrics, by hand, and on the published COCO panoptic sample."""

import importlib
import json

import cv2
import numpy as np
import pytest
import torch

from mpformer.evaluate.panoptic import Counts, count_classes, count_segments, panoptic_quality
from mpformer.types import ClassInfo, ClassTable

CLASSES = ClassTable(
    (ClassInfo("cup", 1), ClassInfo("dog", 2), ClassInfo("sky", 3, False), ClassInfo("sea", 4, False))
)


def quality(counts: Counts, classes: ClassTable = CLASSES) -> dict[str, float]:
    return panoptic_quality(counts, classes, classes.thing_labels).summary


def test_a_semantic_map_by_hand():
    """Truth: void 2, class 0 on 10, class 3 on 8. Found: class 0 on 11, class 3 on 5, class 1 on 4."""
    truth = np.repeat([[255] * 2 + [0] * 10 + [3] * 8], 3, axis=0)
    found = np.repeat([[0] * 11 + [1] * 4 + [3] * 5], 3, axis=0)
    counts = count_classes(truth, found, 4)
    assert counts.iou.tolist() == pytest.approx([9 / 10, 0, 0, 5 / 8])
    assert counts.true_positives.tolist() == [1, 0, 0, 1]
    assert counts.false_positives.tolist() == [0, 1, 0, 0]
    assert counts.false_negatives.tolist() == [0, 0, 0, 0]


def ids_of(*widths: int) -> np.ndarray:
    """A map of height 10: columns of the given widths with ids 0, 1, 2, ..."""
    return np.repeat(np.repeat(np.arange(len(widths)), widths)[None], 10, axis=0)


def test_a_match_by_hand():
    """Truth: void 2, cup 8, sky 10. Found: cup 2..9, sky 9..20."""
    truth, found = ids_of(2, 8, 10), ids_of(2, 7, 11)
    counts = count_segments(truth, [0, 2], [False, False], found, [0, 2], 4)
    assert counts.iou.tolist() == pytest.approx([7 / 8, 0, 10 / 11, 0])
    summary = quality(counts)
    assert summary["PQ"] == pytest.approx(100 * (7 / 8 + 10 / 11) / 2)
    assert summary["PQ_things"] == pytest.approx(100 * 7 / 8)
    assert summary["SQ_stuff"] == pytest.approx(100 * 10 / 11)
    assert summary["RQ"] == pytest.approx(100)


def test_void_pixels_are_not_counted_in_the_union():
    truth, found = ids_of(6, 4, 0), np.zeros((10, 10), dtype=int)
    found[:, 3:] = 1  # 4 columns right, 3 in void
    counts = count_segments(truth, [0], [False], found, [0], 4)
    assert counts.iou[0] == 1.0


def test_exactly_half_is_no_match():
    truth, found = ids_of(0, 10), ids_of(5, 5)
    counts = count_segments(truth, [0], [False], found, [0], 4)
    assert (counts.true_positives[0], counts.false_positives[0], counts.false_negatives[0]) == (0, 1, 1)


def test_the_wrong_class_is_a_false_negative_and_a_false_positive():
    counts = count_segments(ids_of(0, 10), [0], [False], ids_of(0, 10), [1], 4)
    assert counts.false_negatives.tolist() == [1, 0, 0, 0]
    assert counts.false_positives.tolist() == [0, 1, 0, 0]
    assert quality(counts)["PQ"] == 0


@pytest.mark.parametrize(("in_void", "false_positives"), [(5, 1), (6, 0)])
def test_a_segment_mostly_in_void_is_ignored(in_void, false_positives):
    truth = ids_of(in_void, 10 - in_void)
    counts = count_segments(truth, [1], [False], np.ones((10, 10), dtype=int), [0], 4)
    assert counts.false_positives[0] == false_positives


@pytest.mark.parametrize(("label", "false_positives"), [(0, 0), (1, 1)])
def test_crowd_is_ignored_for_its_own_class_and_never_a_false_negative(label, false_positives):
    counts = count_segments(ids_of(0, 10), [0], [True], ids_of(0, 10), [label], 4)
    assert counts.false_positives.sum() == false_positives
    assert counts.false_negatives.sum() == counts.true_positives.sum() == 0


def test_only_void_and_nothing_found():
    nothing = np.zeros((10, 10), dtype=int)
    assert quality(count_segments(nothing, [], [], nothing, [], 4)) == {}
    assert quality(count_segments(nothing, [], [], np.ones_like(nothing), [0], 4)) == {}
    unmatched = count_segments(np.ones_like(nothing), [0], [False], nothing, [], 4)
    assert quality(unmatched) == {
        name + suffix: 0.0 for name in ("PQ", "SQ", "RQ") for suffix in ("", "_things")
    }


def test_a_class_that_occurs_nowhere_is_left_out():
    counts = count_segments(ids_of(0, 10), [0], [False], ids_of(0, 10), [0], 4)
    scores = panoptic_quality(counts, CLASSES, CLASSES.thing_labels)
    assert scores.summary["PQ"] == 100
    assert list(scores.per_class) == ["cup"]
    assert "PQ_stuff" not in scores.summary


SEGMENT_CLASSES = (None, 0, 0, 0, 1, 1, 2, 3)  # cell value: void, three cups, two dogs, sky, sea


def segment_map(cells: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Cells of 4x4 pixels to ids, with the class of each id; 0 is void."""
    ids, labels = np.zeros(cells.shape, dtype=int), []
    for value in np.unique(cells[cells > 0]):
        labels.append(SEGMENT_CLASSES[value])
        ids[cells == value] = len(labels)
    return np.kron(ids, np.ones((4, 4), dtype=int)), labels


def category_and_instance(ids: np.ndarray, labels: list[int]) -> torch.Tensor:
    """torchmetrics' form, [1,h,w,2]; a category that it does not know is void to it."""
    category = np.array([99, *labels])[ids]
    return torch.tensor(np.stack([category, np.where(category < 2, ids, 0)], -1))[None]


def test_equals_torchmetrics_on_random_maps():
    """No void in the predictions: there torchmetrics departs from the official definition."""
    importlib.import_module("mpformer.model.backbone")  # mends a torchvision that was built for CUDA
    from torchmetrics.detection import PanopticQuality

    rng = np.random.default_rng(0)
    peer = PanopticQuality(things={0, 1}, stuffs={2, 3}, return_per_class=True, return_sq_and_rq=True)
    total = Counts.zero(4)
    for _ in range(40):
        stripes = np.repeat(rng.integers(0, 8, (2, 8)), 4, axis=0)
        truth = segment_map(np.where(rng.random((8, 8)) < 0.1, rng.integers(0, 8, (8, 8)), stripes))
        guess = np.where(rng.random((8, 8)) < 0.3, rng.integers(1, 8, (8, 8)), stripes)
        found = segment_map(np.where(guess == 0, 5, guess))
        total += count_segments(truth[0], truth[1], [False] * len(truth[1]), *found, 4)
        peer.update(category_and_instance(*found), category_and_instance(*truth))
    scores = panoptic_quality(total, CLASSES, CLASSES.thing_labels)
    assert 10 < scores.summary["PQ"] < 90
    for name, expected in zip(CLASSES.names, peer.compute().view(4, 3).tolist()):
        ours = [scores.per_class[name][key] / 100 for key in ("PQ", "SQ", "RQ")]
        assert ours == pytest.approx(expected, rel=1e-5), name


@pytest.fixture(scope="module")
def published(sample_data):
    """(class table, [(ids, labels, crowd)]) of the COCO panoptic sample."""
    root = sample_data / "coco_panoptic_sample" / "sample_data"
    data = json.loads((root / "panoptic_examples.json").read_text())
    table = ClassTable(tuple(ClassInfo(c["name"], c["id"], bool(c["isthing"])) for c in data["categories"]))
    of = table.labels_by_source_id()
    images = []
    for annotation in data["annotations"]:
        b, g, r = np.moveaxis(
            cv2.imread(str(root / "panoptic_examples" / annotation["file_name"])), 2, 0
        ).astype(int)
        source = r + 256 * g + 65536 * b
        ids = np.zeros(source.shape, dtype=int)
        for i, segment in enumerate(annotation["segments_info"]):
            ids[source == segment["id"]] = i + 1
        segments = annotation["segments_info"]
        images.append((ids, [of[s["category_id"]] for s in segments], [bool(s["iscrowd"]) for s in segments]))
    return table, images


def test_the_published_sample_against_itself_is_100(published):
    table, images = published
    total = Counts.zero(len(table))
    for ids, labels, crowd in images:
        kept = np.array([0, *(0 if c else i + 1 for i, c in enumerate(crowd))])  # crowd is not predicted
        total += count_segments(ids, labels, crowd, kept[ids], labels, len(table))
    summary = quality(total, table)
    assert all(summary[k] == pytest.approx(100) for k in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"))
    assert int(total.true_positives.sum()) == sum(not c for _, _, crowd in images for c in crowd)


def test_a_perturbed_copy_of_the_published_sample_by_hand(published):
    """One segment cut to 60 % of its pixels (IoU 0.6), one to 40 % (no match): counted on a single image."""
    table, images = published
    ids, labels, crowd = images[0]
    things = [i for i, l in enumerate(labels) if l in table.thing_labels and not crowd[i]]
    by_area = sorted(things, key=lambda i: -(ids == i + 1).sum())
    found = ids.copy().ravel()
    shares = dict(zip(by_area, (0.6, 0.4)))
    for i, share in shares.items():
        pixels = np.flatnonzero(found == i + 1)
        found[pixels[round(len(pixels) * share) :]] = 0
    whole = count_segments(ids, labels, crowd, ids, labels, len(table))
    cut = count_segments(ids, labels, crowd, found.reshape(ids.shape), labels, len(table))
    first, second = (labels[i] for i in shares)
    area = int((ids == by_area[0] + 1).sum())
    assert cut.true_positives.sum() == whole.true_positives.sum() - 1
    assert cut.false_positives[second] == cut.false_negatives[second] == 1
    lost = whole.iou.sum() - cut.iou.sum()
    assert lost == pytest.approx(1 - round(area * 0.6) / area + 1)
    assert first in table.thing_labels
