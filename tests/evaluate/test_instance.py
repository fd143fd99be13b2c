"""Mask AP: run-length encoding and metrics against pycocotools and hand-computed cases."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mpformer.evaluate import instance
from mpformer.evaluate.instance import ImageInstances, TrueInstance
from mpformer.evaluate.prediction import FoundInstance
from mpformer.types import ClassTable

SIZE = (40, 60)
CLASSES = ClassTable.numbered(3)


def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def true(label: int, mask: np.ndarray, crowd: bool = False) -> TrueInstance:
    return TrueInstance(label, crowd, instance.encode_mask(mask), float(mask.sum()))


def found(label: int, score: float, mask: np.ndarray) -> FoundInstance:
    return FoundInstance(label, score, instance.encode_mask(mask))


@pytest.mark.parametrize("seed", range(20))
def test_encoding_a_crop_equals_pycocotools_on_the_whole_mask(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 30, 2))
    mask = np.zeros(size, dtype=bool)
    top, left = (int(rng.integers(0, s)) for s in size)
    bottom, right = int(rng.integers(top, size[0] + 1)), int(rng.integers(left, size[1] + 1))
    crop = rng.random((bottom - top, right - left)) < (0.1, 0.5, 0.95, 1.0, 0.0)[seed % 5]
    mask[top:bottom, left:right] = crop
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    counts = instance.encode(crop, top, left, size)
    assert counts == expected
    assert (instance.decode(counts, size) == mask).all()
    assert instance.area(counts, size) == mask.sum()


def test_columns_that_touch_are_one_run():
    """A mask of full columns is one run in column order."""
    counts = instance.encode(np.ones((5, 3), dtype=bool), 0, 2, (5, 7))
    assert counts == coco_mask.encode(np.asfortranarray(box(0, 2, 5, 5, (5, 7)).astype(np.uint8)))["counts"]


def test_a_perfect_prediction_is_100_and_areas_without_truth_are_absent():
    masks = [box(0, 0, 20, 20), box(10, 30, 30, 50)]  # 400 pixels: small
    image = ImageInstances(
        SIZE, [true(i, m) for i, m in enumerate(masks)], [found(i, 0.9, m) for i, m in enumerate(masks)]
    )
    scores = instance.average_precision([image], CLASSES, CLASSES.thing_labels)
    for name in ("AP", "AP50", "AP75", "AP_small", "AR1", "AR100"):
        assert scores.summary[name] == pytest.approx(100)
    assert "AP_medium" not in scores.summary
    assert "AP_large" not in scores.summary
    assert set(scores.per_class) == {"class 0", "class 1"}  # class 2 is absent from the truth


def test_one_half_right_by_hand():
    """Truth of 20x20; the prediction covers 20x15 of it: IoU 0.75 passes 6 of the 10 thresholds."""
    image = ImageInstances(SIZE, [true(0, box(0, 0, 20, 20))], [found(0, 0.8, box(0, 0, 20, 15))])
    summary = instance.average_precision([image], CLASSES, frozenset({0})).summary
    assert summary["AP"] == pytest.approx(60)
    assert summary["AP50"] == pytest.approx(100)
    assert summary["AP75"] == pytest.approx(100)


def test_a_better_scored_mistake_halves_the_precision():
    image = ImageInstances(
        SIZE,
        [true(0, box(0, 0, 20, 20))],
        [found(0, 0.9, box(20, 40, 40, 60)), found(0, 0.8, box(0, 0, 20, 20))],
    )
    assert instance.average_precision([image], CLASSES, frozenset({0})).summary["AP"] == pytest.approx(50)


def test_detections_in_a_crowd_region_are_ignored_and_the_region_is_no_object():
    crowd = true(0, box(20, 0, 40, 60), crowd=True)
    good, in_crowd = found(0, 0.5, box(0, 0, 20, 20)), found(0, 0.9, box(22, 5, 30, 15))
    image = ImageInstances(SIZE, [true(0, box(0, 0, 20, 20)), crowd], [in_crowd, good])
    assert instance.average_precision([image], CLASSES, frozenset({0})).summary["AP"] == pytest.approx(100)
    only = ImageInstances(SIZE, [crowd], [in_crowd])
    assert instance.average_precision([only], CLASSES, frozenset({0})).summary == {}


@pytest.mark.parametrize("images", [[], [ImageInstances(SIZE, [], [])]])
def test_without_truth_and_predictions_there_are_no_metrics(images):
    assert instance.average_precision(images, CLASSES, CLASSES.thing_labels).summary == {}


def test_no_prediction_is_0_and_prediction_without_truth_is_undefined():
    truth = ImageInstances(SIZE, [true(1, box(0, 0, 9, 9))], [])
    assert instance.average_precision([truth], CLASSES, CLASSES.thing_labels).summary["AP"] == 0
    spurious = ImageInstances(SIZE, [], [found(1, 0.9, box(0, 0, 9, 9))])
    assert instance.average_precision([spurious], CLASSES, CLASSES.thing_labels).summary == {}


def random_images(seed: int, count: int = 12) -> list[ImageInstances]:
    """Boxes of all sizes with jittered predictions, some missing, some wrong, some crowd."""
    rng = np.random.default_rng(seed)
    size = (150, 200)
    images = []
    for _ in range(count):
        truth, predictions = [], []
        for _ in range(rng.integers(0, 6)):
            h, w = rng.integers(4, 140, 2)
            top, left = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
            label = int(rng.integers(0, 3))
            truth.append(true(label, box(top, left, top + h, left + w, size), crowd=rng.random() < 0.15))
            dy, dx = rng.integers(-6, 7, 2)
            if rng.random() < 0.8:
                shaken = box(max(0, top + dy), max(0, left + dx), top + dy + h, left + dx + w, size)
                predictions.append(
                    found(label if rng.random() < 0.8 else (label + 1) % 3, rng.random(), shaken)
                )
        images.append(ImageInstances(size, truth, predictions))
    return images


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_by_hand_on_exported_files(seed, tmp_path, capsys):
    images = random_images(seed)

    def exported(entry, counts, size):
        return {**entry, "segmentation": {"size": list(size), "counts": counts.decode()}}

    annotations, detections = [], []
    for i, image in enumerate(images):
        for t in image.truth:
            entry = {
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": t.label + 7,
                "area": t.area,
                "iscrowd": int(t.crowd),
            }
            annotations.append(exported(entry, t.counts, image.size))
        for f in image.found:
            entry = {"image_id": i, "category_id": f.label + 7, "score": f.score}
            detections.append(exported(entry, f.counts, image.size))
    truth = {
        "images": [{"id": i, "height": 150, "width": 200} for i in range(len(images))],
        "categories": [{"id": k + 7, "name": str(k)} for k in range(3)],
        "annotations": annotations,
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(detections))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        by_hand = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "segm")
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()

    summary = instance.average_precision(images, CLASSES, CLASSES.thing_labels).summary
    assert capsys.readouterr().out == ""
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    names += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    assert len(summary) == 12
    assert 5 < summary["AP"] < 95
    for name, value in zip(names, by_hand.stats):
        assert summary[name] == value * 100, name


def test_the_boundary_of_a_mask_by_hand():
    """40x60: the diagonal is 72, so the boundary is 1 pixel wide; at the image's border, too."""
    square, corner = box(10, 10, 20, 20), box(0, 0, 5, 5)
    ring = square & ~box(11, 11, 19, 19)
    assert (instance.decode(instance.boundary(instance.encode_mask(square), SIZE), SIZE) == ring).all()
    ring = corner & ~box(1, 1, 4, 4)
    assert (instance.decode(instance.boundary(instance.encode_mask(corner), SIZE), SIZE) == ring).all()
    nothing = instance.encode_mask(box(0, 0, 0, 0))
    assert instance.boundary(nothing, SIZE) == nothing


def test_boundary_width_and_holes():
    """200x150 (diagonal 250): 5 pixels wide, and along a hole as well."""
    size = (200, 150)
    mask = box(20, 20, 120, 120, size) & ~box(60, 60, 80, 80, size)
    found = instance.decode(instance.boundary(instance.encode_mask(mask), size), size)
    core = box(25, 25, 115, 115, size) & ~box(55, 55, 85, 85, size)
    assert (found == (mask & ~core)).all()


def test_boundary_ap_by_hand():
    """20x20 against the same cut to 20x19: mask IoU 0.95, boundaries 76 and 74 pixels, 56 in common."""
    image = ImageInstances(SIZE, [true(0, box(0, 0, 20, 20))], [found(0, 0.8, box(0, 0, 20, 19))])
    by_mask = instance.average_precision([image], CLASSES, frozenset({0})).summary
    by_boundary = instance.average_precision([image], CLASSES, frozenset({0}), by_boundary=True).summary
    assert by_mask["AP"] == pytest.approx(100)  # 0.95 passes all ten thresholds
    assert by_boundary["AP"] == pytest.approx(20)  # 56 / (76 + 74 - 56) = 0.596 passes 0.5 and 0.55


def test_boundary_ap_takes_the_smaller_iou_and_ignores_crowds():
    crowd = true(0, box(20, 0, 40, 60), crowd=True)
    in_crowd = found(0, 0.9, box(20, 0, 40, 60))
    small = box(30, 30, 32, 32)  # all boundary: both IoUs are one
    image = ImageInstances(SIZE, [crowd, true(1, small)], [in_crowd, found(1, 0.5, small)])
    summary = instance.average_precision([image], CLASSES, CLASSES.thing_labels, by_boundary=True).summary
    assert summary["AP"] == pytest.approx(100)
    images = random_images(5)
    by_mask = instance.average_precision(images, CLASSES, CLASSES.thing_labels).summary
    by_boundary = instance.average_precision(images, CLASSES, CLASSES.thing_labels, by_boundary=True).summary
    assert 0 < by_boundary["AP"] < by_mask["AP"]
