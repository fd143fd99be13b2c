"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019) with void and crowd regions."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from mpformer.evaluate.prediction import Scores
from mpformer.types import ClassTable


@dataclass(frozen=True)
class Counts:
    """Sums over images, one entry per class [K]."""

    iou: np.ndarray
    """Sum of IoU over the true positives."""
    true_positives: np.ndarray
    """Matched pairs of a predicted and a true segment."""
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @classmethod
    def zero(cls, classes: int) -> Counts:
        return cls(np.zeros(classes), *(np.zeros(classes, dtype=np.int64) for _ in range(3)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.iou + other.iou,
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )


@dataclass(frozen=True)
class Matches:
    """Which objects of one image were found. True and found ones are told by their places in the lists that
    were compared."""

    matched: np.ndarray
    """[N,2] int64: (true, found), of the same class."""
    iou: np.ndarray
    """[N], above 0.5."""
    false: np.ndarray
    """[F] int64: found ones that match none."""
    missed: np.ndarray
    """[M] int64: true ones that none matches."""
    confused: np.ndarray
    """[C,2] int64: (missed, false) that overlap as matches do, but are of two classes."""

    def counts(self, true_labels: np.ndarray, found_labels: np.ndarray, classes: int) -> Counts:
        """By class; labels [T] and [P] int64."""
        labels = true_labels[self.matched[:, 0]]
        return Counts(
            np.bincount(labels, weights=self.iou, minlength=classes),
            np.bincount(labels, minlength=classes),
            np.bincount(found_labels[self.false], minlength=classes),
            np.bincount(true_labels[self.missed], minlength=classes),
        )

    def renumbered(self, places: Sequence[int]) -> Matches:
        """With each true object told by its place in a longer list, of which those compared are a part."""
        numbers = np.asarray(places, np.int64)

        def of_pairs(pairs: np.ndarray) -> np.ndarray:
            return np.stack([numbers[pairs[:, 0]], pairs[:, 1]], axis=1)

        return replace(
            self,
            matched=of_pairs(self.matched),
            missed=numbers[self.missed],
            confused=of_pairs(self.confused),
        )

    def outcomes(self, true_labels: np.ndarray, found_labels: np.ndarray, classes: int) -> np.ndarray:
        """[N,3] int64: (true class, found class, 1) of each object; `classes` stands for none."""
        missed = np.setdiff1d(self.missed, self.confused[:, 0])
        false = np.setdiff1d(self.false, self.confused[:, 1])
        both = np.concatenate([self.matched, self.confused])
        none = [np.full(len(one), classes) for one in (false, missed)]
        true = np.concatenate([true_labels[both[:, 0]], true_labels[missed], none[0]])
        found = np.concatenate([found_labels[both[:, 1]], none[1], found_labels[false]])
        return np.stack([true, found, np.ones_like(true)], axis=1).astype(np.int64)


def match_segments(
    true_ids: np.ndarray,
    true_labels: Sequence[int],
    crowd: Sequence[bool],
    ids: np.ndarray,
    labels: Sequence[int],
) -> Matches:
    """Matches of one image. Both maps [h,w]: 0 void, i the i-th entry of `true_labels` or `labels`.

    A pair matches if both have the same class and their IoU, without void pixels of the truth, is above 0.5.
    A predicted segment with more than half of its area in void, or in crowd regions of its class, is
    ignored; a crowd region is never a false negative.
    """
    true_classes, found_classes = (np.asarray(side, dtype=np.int64) for side in (true_labels, labels))
    is_crowd = np.asarray(crowd, dtype=bool)
    rows, columns = len(true_classes) + 1, len(found_classes) + 1
    pairs = true_ids.astype(np.int64).ravel() * columns + ids.ravel()
    overlap = np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)
    true_area, area = overlap.sum(1)[1:], overlap.sum(0)[1:]
    in_void, overlap = overlap[0, 1:], overlap[1:, 1:]

    same = true_classes[:, None] == found_classes[None]
    union = true_area[:, None] + area[None] - overlap - in_void[None]
    of_any = np.where(~is_crowd[:, None], overlap / np.maximum(union, 1), 0.0)
    iou = np.where(same, of_any, 0.0)
    t, p = np.nonzero(iou > 0.5)
    ignored = in_void + (overlap * (same & is_crowd[:, None])).sum(0)
    false_positive = (area > 0) & (ignored <= 0.5 * area)
    false_positive[p] = False
    false_negative = (true_area > 0) & ~is_crowd
    false_negative[t] = False
    confused = (of_any > 0.5) & false_negative[:, None] & false_positive[None]
    return Matches(
        np.stack([t, p], axis=1),
        iou[t, p],
        np.flatnonzero(false_positive),
        np.flatnonzero(false_negative),
        np.argwhere(confused),
    )


def count_segments(
    true_ids: np.ndarray,
    true_labels: Sequence[int],
    crowd: Sequence[bool],
    ids: np.ndarray,
    labels: Sequence[int],
    classes: int,
) -> Counts:
    """The matches of one image (`match_segments`) by class."""
    matches = match_segments(true_ids, true_labels, crowd, ids, labels)
    true, found = (np.asarray(side, dtype=np.int64) for side in (true_labels, labels))
    return matches.counts(true, found, classes)


def count_classes(truth: np.ndarray, labels: np.ndarray, classes: int) -> Counts:
    """Matches of one semantic image, each class being one segment. Both maps [h,w]: 0..K-1, else void."""
    segments = range(classes)
    true_ids, ids = (np.where((m >= 0) & (m < classes), m.astype(np.int64) + 1, 0) for m in (truth, labels))
    return count_segments(true_ids, segments, [False] * classes, ids, segments, classes)


def panoptic_quality(counts: Counts, classes: ClassTable, things: Set[int]) -> Scores:
    """PQ, SQ and RQ in percent: means over the classes that occur in truth or prediction.

    Keys PQ, SQ, RQ, and the same with _things and _stuff. `things`: labels counted as things.
    """
    matched = counts.true_positives
    total = matched + 0.5 * counts.false_positives + 0.5 * counts.false_negatives
    occurs = total > 0
    metrics = {
        "PQ": counts.iou / np.where(occurs, total, 1),
        "SQ": counts.iou / np.maximum(matched, 1),
        "RQ": matched / np.where(occurs, total, 1),
    }
    is_thing = np.array([label in things for label in range(len(classes))])
    summary: dict[str, float] = {}
    for suffix, group in (("", occurs), ("_things", occurs & is_thing), ("_stuff", occurs & ~is_thing)):
        if group.any():
            summary |= {name + suffix: float(v[group].mean() * 100) for name, v in metrics.items()}
    per_class = {
        classes.names[k]: {name: float(v[k] * 100) for name, v in metrics.items()}
        for k in np.flatnonzero(occurs).tolist()
    }
    return Scores(summary, per_class)
