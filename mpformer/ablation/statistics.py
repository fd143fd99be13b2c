"""Means, differences and orderings over seeds, with their 95 % intervals (Student's t)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Curve = Sequence[tuple[float, float]]
"""(x, metric), x ascending."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; `half_width` of its 95 % interval, None where n is 1."""

    mean: float
    half_width: float | None
    n: int

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % t interval of independent values; None without any."""
    array = np.asarray(list(values), dtype=np.float64)
    return _estimate(array) if len(array) else None


def _estimate(array: np.ndarray) -> Estimate:
    """The same of at least one value."""
    n = len(array)
    if n == 1:
        return Estimate(float(array[0]), None, 1)
    spread = array.std(ddof=1) / math.sqrt(n)
    return Estimate(float(array.mean()), float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread), n)


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """`ours` minus `baseline` on the seeds that both have; None where there is no such seed."""
    return estimate(ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys()))


@dataclass(frozen=True)
class Ordering:
    """How many pairs of rows are in the paper's order, of all for which the paper's figures differ."""

    pairs: int
    as_in_paper: int
    resolved_as_in_paper: int
    """Of these, those whose difference on the same seeds has an interval that excludes zero."""
    resolved_against: int

    @property
    def reproduced(self) -> bool:
        return self.as_in_paper == self.pairs


def ordering(ours: Mapping[str, Mapping[int, float]], paper: Mapping[str, float]) -> Ordering | None:
    """The order of the rows (means over the seeds that both rows of a pair have) against the paper's figures.

    None where no two rows with different figures in the paper have a common seed.
    """
    pairs = agree = resolved = against = 0
    for a, b in itertools.combinations([row for row in paper if ours.get(row)], 2):
        difference = paired_difference(ours[a], ours[b])
        if difference is None or paper[a] == paper[b]:
            continue
        pairs += 1
        same = (difference.mean > 0) == (paper[a] > paper[b]) and difference.mean != 0
        agree += same
        resolved += same and difference.resolved
        against += not same and difference.resolved
    return Ordering(pairs, agree, resolved, against) if pairs else None


def first_reach(curve: Curve, target: float) -> float | None:
    """Where a curve, interpolated linearly, first reaches `target`; None if nowhere."""
    earlier: tuple[float, float] | None = None
    for x, y in curve:
        if y >= target:
            if earlier is None or earlier[1] == y:
                return x
            x0, y0 = earlier
            return x0 + (x - x0) * (target - y0) / (y - y0)
        earlier = (x, y)
    return None


@dataclass(frozen=True)
class Reach:
    """How far a row must train to be as good as the baseline at its end."""

    amount: Estimate | None
    """None unless all seeds reach it: a mean over those that do would be biased in the row's favour."""
    share: Estimate | None
    """Of the baseline's own amount, on the same seeds."""
    reached: int
    n: int


def reach(curves: Mapping[int, Curve], baseline: Mapping[int, Curve]) -> Reach | None:
    """Where a row's curve first reaches the baseline's final value of the same seed; None without one.

    A baseline that was only measured untrained has no final value.
    """
    both = sorted(curves.keys() & baseline.keys())
    seeds = [seed for seed in both if curves[seed] and baseline[seed] and baseline[seed][-1][0] > 0]
    if not seeds:
        return None
    found = (first_reach(curves[seed], baseline[seed][-1][1]) for seed in seeds)
    reached = {seed: x for seed, x in zip(seeds, found) if x is not None}
    if len(reached) < len(seeds):
        return Reach(None, None, len(reached), len(seeds))
    shares = (x / baseline[seed][-1][0] for seed, x in reached.items())
    return Reach(estimate(reached.values()), estimate(shares), len(reached), len(seeds))


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Estimate]]:
    """The estimate over seeds at every x that any of the curves has."""
    by_x: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            if math.isfinite(y):
                by_x.setdefault(x, []).append(y)
    return [(x, _estimate(np.asarray(values))) for x, values in sorted(by_x.items())]


def aligned_curve(curves: Sequence[Curve], points: int = 60) -> list[tuple[float, Estimate]]:
    """As `mean_curve`, for curves whose points lie at different x (hours): each is interpolated linearly at
    evenly spaced x that all of them cover."""
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return []
    low, high = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    if low >= high:
        return []
    xs = np.linspace(low, high, points)
    read = [np.interp(xs, *np.transpose(curve)) for curve in curves]
    return [(float(x), _estimate(ys)) for x, ys in zip(xs, np.transpose(read))]
