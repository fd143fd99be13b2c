"""Orderings, amounts of training and joined curves: by hand, and on simulated results of known effect."""

import math

import numpy as np
import pytest

from mpformer.ablation.statistics import (
    aligned_curve,
    estimate,
    first_reach,
    ordering,
    paired_difference,
    reach,
)


def test_a_known_effect_lies_in_the_interval_of_paired_differences_as_often_as_it_says():
    """A row that is 1.1 AP better than its baseline; seeds shift both rows by far more than the effect."""
    random = np.random.default_rng(3)
    hits, resolved, repetitions, seeds = 0, 0, 3000, 4
    for _ in range(repetitions):
        shift = random.normal(0, 3, seeds)
        baseline = dict(enumerate(43.7 + shift + random.normal(0, 0.2, seeds)))
        ours = dict(enumerate(44.8 + shift + random.normal(0, 0.2, seeds)))
        found = paired_difference(ours, baseline)
        hits += abs(found.mean - 1.1) <= found.half_width
        resolved += found.resolved
    deviation = math.sqrt(repetitions * 0.95 * 0.05)
    assert abs(hits - 0.95 * repetitions) < 4 * deviation
    assert resolved > 0.95 * repetitions  # pairing sees an effect that the seeds' spread of 3 would hide


def test_no_effect_is_called_resolved_in_one_of_twenty():
    random = np.random.default_rng(4)
    false = sum(estimate(values).resolved for values in random.normal(0, 1, (4000, 3)))
    assert abs(false - 200) < 4 * math.sqrt(4000 * 0.05 * 0.95)


def test_an_ordering_counts_the_pairs_that_the_paper_tells_apart():
    paper = {"a": 38.7, "b": 39.4, "c": 39.4, "d": 40.2}
    ours = {
        "a": {0: 10.0, 1: 11.0, 2: 12.0},
        "b": {0: 12.0, 1: 13.1, 2: 13.9},  # above a by 2.0, 2.1, 1.9: resolved, as in the paper
        "c": {0: 9.0, 1: 10.1, 2: 10.9},  # below a by 1.0, 0.9, 1.1: resolved, the other way round
        "d": {0: 12.5},  # one seed: above all on it, never resolved
    }
    found = ordering(ours, paper)
    # a-b, a-c, a-d, b-d, c-d: five, as the paper has b and c alike
    assert (found.pairs, found.as_in_paper) == (5, 4)
    assert (found.resolved_as_in_paper, found.resolved_against) == (1, 1)
    assert not found.reproduced
    assert ordering({"a": ours["a"], "b": ours["b"]}, paper).reproduced
    assert ordering({"a": {0: 1.0}, "b": {1: 2.0}}, paper) is None  # no common seed
    assert ordering({"a": {0: 1.0}, "b": {}}, paper) is None


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(0, 0.0), (100, 10.0)], 5.0, 50.0),
        ([(0, 0.0), (100, 10.0), (200, 4.0), (300, 20.0)], 10.0, 100.0),
        ([(0, 6.0), (100, 10.0)], 5.0, 0),
        ([(0, 0.0), (100, 4.0)], 5.0, None),
        ([(0, 0.0), (100, 4.0), (200, 4.0), (300, 6.0)], 5.0, 250.0),
        ([], 5.0, None),
    ],
)
def test_where_a_curve_first_reaches_a_value(curve, target, expected):
    assert first_reach(curve, target) == expected


def test_the_share_of_training_is_taken_seed_by_seed_and_only_where_all_seeds_reach_it():
    baseline = {0: [(0, 0.0), (100, 10.0)], 1: [(0, 0.0), (100, 20.0)]}
    fast = {0: [(0, 0.0), (100, 20.0)], 1: [(0, 0.0), (100, 25.0)], 5: [(0, 0.0)]}
    found = reach(fast, baseline)
    assert (found.amount.mean, found.share.mean, found.reached, found.n) == (65.0, 0.65, 2, 2)  # 50 and 80
    slow = {0: [(0, 0.0), (100, 9.0)], 1: [(0, 0.0), (100, 40.0)]}
    found = reach(slow, baseline)
    assert (found.amount, found.share, found.reached, found.n) == (None, None, 1, 2)
    assert reach({7: baseline[0]}, baseline) is None


def test_curves_over_hours_are_joined_where_all_seeds_have_them():
    joined = aligned_curve([[(0, 0.0), (10, 10.0)], [(0, 2.0), (8, 10.0)]], points=3)
    assert [x for x, _ in joined] == [0.0, 4.0, 8.0]
    assert [e.mean for _, e in joined] == [1.0, 5.0, 9.0]
    assert aligned_curve([]) == []
    assert aligned_curve([[(0, 1.0), (1, 2.0)], [(3, 1.0), (4, 2.0)]]) == []


def test_a_baseline_measured_untrained_only_is_reached_by_nobody():
    assert reach({0: [(0, 1.0), (100, 5.0)]}, {0: [(0, 1.0)]}) is None
