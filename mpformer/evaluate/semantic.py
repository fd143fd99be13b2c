"""Semantic metrics from a confusion matrix: mIoU and pixel accuracy."""

from __future__ import annotations

import numpy as np

from mpformer.evaluate.prediction import Scores
from mpformer.types import ClassTable


def confusion(truth: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Pixel counts by (true, predicted) class, [K,K+1] int64; the last column is predicted void.

    Both maps [h,w]: labels 0..K-1; any other value is void. Pixels that are void in the truth are ignored.
    """
    truth, labels = truth.ravel().astype(np.int64), labels.ravel().astype(np.int64)
    counted = (truth >= 0) & (truth < classes)
    labels = np.where((labels >= 0) & (labels < classes), labels, classes)
    pairs = truth[counted] * (classes + 1) + labels[counted]
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """IoU per class [K], 0..1, from a `confusion` matrix; NaN for classes that are absent from the truth."""
    correct = np.diagonal(matrix)
    true, predicted = matrix.sum(1), matrix[:, :-1].sum(0)
    return np.where(true > 0, correct / np.maximum(true + predicted - correct, 1), np.nan)


def mean_iou(matrix: np.ndarray, classes: ClassTable) -> Scores:
    """mIoU and pixel accuracy in percent from a sum of `confusion` matrices.

    Classes that are absent from the truth are left out of the means; where they are predicted, they lower
    the IoU of the true class. Keys: mIoU, pixel_accuracy, class_accuracy; per class IoU and accuracy.
    """
    correct, true = np.diagonal(matrix), matrix.sum(1)
    occurs = true > 0
    if not occurs.any():
        return Scores()
    iou, accuracy = class_iou(matrix), correct / np.maximum(true, 1)
    return Scores(
        {
            "mIoU": float(iou[occurs].mean() * 100),
            "pixel_accuracy": float(correct.sum() / true.sum() * 100),
            "class_accuracy": float(accuracy[occurs].mean() * 100),
        },
        {
            classes.names[k]: {"IoU": float(iou[k] * 100), "accuracy": float(accuracy[k] * 100)}
            for k in np.flatnonzero(occurs).tolist()
        },
    )
