"""Semantic figures from one confusion matrix: mIoU and pixel accuracy."""

from __future__ import annotations

import numpy as np

from mpformer.evaluate.prediction import Scores
from mpformer.types import ClassTable


def confusion(truth: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by (true, predicted) class, [K,K+1] int64; the last column is predicted void.

    Both maps [h,w]: labels 0..K-1; anything else is void. Void pixels of the truth count nowhere.
    """
    truth, labels = truth.ravel().astype(np.int64), labels.ravel().astype(np.int64)
    counted = (truth >= 0) & (truth < classes)
    labels = np.where((labels >= 0) & (labels < classes), labels, classes)
    pairs = truth[counted] * (classes + 1) + labels[counted]
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def mean_iou(matrix: np.ndarray, classes: ClassTable) -> Scores:
    """mIoU and pixel accuracy in percent from a sum of `confusion` matrices.

    A class that never occurs in the truth takes no part in the means (but where it is predicted, it costs
    the class that is there). Keys: mIoU, pixel_accuracy, class_accuracy; per class IoU and accuracy.
    """
    right = np.diagonal(matrix).astype(float)
    true, predicted = matrix.sum(1), matrix[:, :-1].sum(0)
    occurs = true > 0
    if not occurs.any():
        return Scores()
    iou = right / np.maximum(true + predicted - right, 1)
    accuracy = right / np.maximum(true, 1)
    return Scores(
        {
            "mIoU": float(iou[occurs].mean() * 100),
            "pixel_accuracy": float(right.sum() / true.sum() * 100),
            "class_accuracy": float(accuracy[occurs].mean() * 100),
        },
        {
            classes.names[k]: {"IoU": float(iou[k] * 100), "accuracy": float(accuracy[k] * 100)}
            for k in np.flatnonzero(occurs).tolist()
        },
    )
