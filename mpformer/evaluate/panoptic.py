"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4) with void and crowd."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from mpformer.evaluate.prediction import Scores
from mpformer.types import ClassTable


@dataclass(frozen=True)
class Counts:
    """Sums over images, one entry per class [K]."""

    iou: np.ndarray
    """Sum of IoU over the matched pairs."""
    matched: np.ndarray
    spurious: np.ndarray
    """Predicted segments without a match: false positives."""
    missed: np.ndarray
    """True segments without a match: false negatives."""

    @classmethod
    def zero(cls, classes: int) -> Counts:
        return cls(np.zeros(classes), *(np.zeros(classes, dtype=np.int64) for _ in range(3)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.iou + other.iou,
            self.matched + other.matched,
            self.spurious + other.spurious,
            self.missed + other.missed,
        )


def count_segments(
    true_ids: np.ndarray,
    true_labels: Sequence[int],
    crowd: Sequence[bool],
    ids: np.ndarray,
    labels: Sequence[int],
    classes: int,
) -> Counts:
    """Matches of one image. Both maps [h,w]: 0 void, i the i-th entry of the labels that follow it.

    A pair matches if it has one class and IoU above 0.5, void pixels of the truth not counted. A predicted
    segment that lies by more than half in void, or in crowd regions of its own class, is no error; a crowd
    region is never missed.
    """
    true_labels, labels = np.asarray(true_labels, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    crowd = np.asarray(crowd, dtype=bool)
    rows, columns = len(true_labels) + 1, len(labels) + 1
    pairs = true_ids.astype(np.int64).ravel() * columns + ids.ravel()
    overlap = np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)
    true_area, area = overlap.sum(1)[1:], overlap.sum(0)[1:]
    in_void, overlap = overlap[0, 1:], overlap[1:, 1:]

    same = true_labels[:, None] == labels[None]
    union = true_area[:, None] + area[None] - overlap - in_void[None]
    iou = np.where(same & ~crowd[:, None], overlap / np.maximum(union, 1), 0.0)
    t, p = np.nonzero(iou > 0.5)
    pardoned = in_void + (overlap * (same & crowd[:, None])).sum(0)
    spurious = (area > 0) & (pardoned <= 0.5 * area)
    spurious[p] = False
    missed = (true_area > 0) & ~crowd
    missed[t] = False
    return Counts(
        np.bincount(true_labels[t], weights=iou[t, p], minlength=classes),
        np.bincount(true_labels[t], minlength=classes),
        np.bincount(labels[spurious], minlength=classes),
        np.bincount(true_labels[missed], minlength=classes),
    )


def count_classes(truth: np.ndarray, labels: np.ndarray, classes: int) -> Counts:
    """Matches of one semantic image, every class of it one segment. Both maps [h,w]: 0..K-1, else void."""
    segments = range(classes)
    true_ids, ids = (np.where((m >= 0) & (m < classes), m.astype(np.int64) + 1, 0) for m in (truth, labels))
    return count_segments(true_ids, segments, [False] * classes, ids, segments, classes)


def panoptic_quality(counts: Counts, classes: ClassTable, things: Set[int]) -> Scores:
    """PQ, SQ and RQ in percent: means over the classes that occur in truth or prediction.

    Keys PQ, SQ, RQ, and the same with _things and _stuff. `things` are the labels counted as things.
    """
    total = counts.matched + 0.5 * counts.spurious + 0.5 * counts.missed
    occurs = total > 0
    figures = {
        "PQ": counts.iou / np.where(occurs, total, 1),
        "SQ": counts.iou / np.maximum(counts.matched, 1),
        "RQ": counts.matched / np.where(occurs, total, 1),
    }
    is_thing = np.array([label in things for label in range(len(classes))])
    summary = {}
    for suffix, group in (("", occurs), ("_things", occurs & is_thing), ("_stuff", occurs & ~is_thing)):
        if group.any():
            summary |= {name + suffix: float(v[group].mean() * 100) for name, v in figures.items()}
    per_class = {
        classes.names[k]: {name: float(v[k] * 100) for name, v in figures.items()}
        for k in np.flatnonzero(occurs).tolist()
    }
    return Scores(summary, per_class)
