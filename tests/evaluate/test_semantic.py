"""mIoU and pixel accuracy against scikit-learn's confusion matrix and by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from mpformer.evaluate.semantic import confusion, mean_iou
from mpformer.types import ClassTable

CLASSES = ClassTable.numbered(5)


def test_equals_scikit_learn():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, (2, 40, 50))
    found = np.where(rng.random(found.shape) < 0.6, truth, found)
    truth[:5] = 255  # void
    matrix = confusion(truth, found, 5)
    counted = truth != 255
    expected = confusion_matrix(truth[counted], found[counted], labels=range(5))
    assert (matrix[:, :5] == expected).all()
    assert not matrix[:, 5].any()
    scores = mean_iou(matrix, CLASSES)
    iou = jaccard_score(truth[counted], found[counted], average=None)
    assert scores.summary["mIoU"] == pytest.approx(iou.mean() * 100)
    assert [scores.per_class[n]["IoU"] for n in CLASSES.names] == pytest.approx(list(iou * 100))
    assert scores.summary["pixel_accuracy"] == pytest.approx((truth == found)[counted].mean() * 100)


def test_an_absent_class_is_left_out_but_lowers_others_where_it_is_predicted():
    """Truth all 0; a quarter predicted as 1: IoU of class 0 is 3/4, class 1 has no truth."""
    truth = np.zeros((4, 4), dtype=int)
    found = truth.copy()
    found[0] = 1
    scores = mean_iou(confusion(truth, found, 5), CLASSES)
    assert scores.summary == {"mIoU": 75.0, "pixel_accuracy": 75.0, "class_accuracy": 75.0}
    assert list(scores.per_class) == ["class 0"]


def test_predicted_void_is_a_miss():
    truth, found = np.zeros((2, 2), dtype=int), np.array([[0, 255], [0, 0]])
    assert mean_iou(confusion(truth, found, 5), CLASSES).summary["mIoU"] == 75.0


def test_only_void_has_no_metrics():
    assert mean_iou(confusion(np.full((2, 2), 255), np.zeros((2, 2)), 5), CLASSES).summary == {}
