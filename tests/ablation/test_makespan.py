"""The model of interrupted runs against simulation, hand-worked cases and a search for the best interval."""

import math

import numpy as np
import pytest

from mpformer.ablation.makespan import Interruptions, best_interval, makespan
from mpformer.types import InputError


def simulate(spot: Interruptions, segments: int, machines: int, seed: int) -> dict[str, float]:
    """One run played through, interruption by interruption."""
    random = np.random.default_rng(seed)
    rate = spot.per_hour * machines
    spent = {"total": 0.0, "lost": 0.0, "restarting": 0.0, "interruptions": 0}
    length = spot.interval_hours + spot.checkpoint_hours
    until = random.exponential(1 / rate)  # the next interruption, from now

    def go(hours: float, waste: str) -> bool:
        nonlocal until
        passed = min(hours, until)
        spent["total"] += passed
        if until >= hours:
            until -= hours
            return True
        spent[waste] += passed
        spent["interruptions"] += 1
        until = random.exponential(1 / rate)
        return False

    for _ in range(segments):
        while not go(length, "lost"):
            while True:
                before = spent["total"]
                if go(spot.restart_hours, "restarting"):
                    spent["restarting"] += spent["total"] - before
                    break
    return spent


@pytest.mark.parametrize(("machines", "restart"), [(1, 0.1), (3, 0.1), (2, 0.0), (4, 0.8)])
def test_expected_hours_are_what_a_simulation_spends(machines, restart):
    spot = Interruptions(per_hour=0.3, interval_hours=0.4, checkpoint_hours=0.05, restart_hours=restart)
    segments = 40_000
    played = simulate(spot, segments, machines, seed=machines)
    spent = spot.spent(segments * spot.interval_hours, machines)
    assert played["total"] == pytest.approx(spent.total, rel=0.02)
    assert played["interruptions"] == pytest.approx(spent.interruptions, rel=0.02)
    assert played["lost"] == pytest.approx(spent.lost, rel=0.03)
    assert played["restarting"] == pytest.approx(spent.restarting, rel=0.03)


def test_limits():
    calm = Interruptions(interval_hours=0.5, checkpoint_hours=0.01).spent(10)
    assert (calm.training, calm.checkpoints, calm.lost, calm.restarting) == (10, 0.2, 0, 0)
    # rare interruptions lose half a segment and a restart each
    rare = Interruptions(1e-4, interval_hours=1, checkpoint_hours=0, restart_hours=0.5).spent(100)
    assert rare.interruptions == pytest.approx(0.01, rel=1e-3)
    assert rare.lost == pytest.approx(0.01 * 0.5, rel=1e-3)
    assert rare.restarting == pytest.approx(0.01 * 0.5, rel=1e-3)
    # by hand, Daly's formula: rate 1, segment 1: (e - 1) hours for each hour
    assert Interruptions(1.0, interval_hours=1).spent(1).total == pytest.approx(math.e - 1)


@pytest.mark.parametrize(("rate", "checkpoint"), [(0.01, 0.005), (0.5, 0.02), (20, 0.1)])
def test_the_best_interval_is_the_least_of_all(rate, checkpoint):
    def hours(interval: float) -> float:
        return Interruptions(rate, interval, checkpoint, restart_hours=0.1).spent(100).total

    best = best_interval(rate, checkpoint)
    candidates = best * np.geomspace(0.2, 5, 401)
    assert hours(best) <= min(hours(t) for t in candidates) * (1 + 1e-12)
    if rate * checkpoint < 1e-3:
        assert best == pytest.approx(math.sqrt(2 * checkpoint / rate), rel=0.05)
    assert best_interval(0, 1) == math.inf


@pytest.mark.parametrize(
    ("hours", "widths", "gpus", "expected"),
    [
        ([], [], 8, 0.0),
        ([3.0, 3.0, 2.0], [1, 1, 1], 2, 5.0),  # 3 | 3, then 2
        ([4.0, 2.0, 2.0], [4, 2, 2], 4, 6.0),  # 4 alone, then both others side by side
        ([4.0, 2.0], [2, 4], 4, 6.0),
        ([1.0] * 1000, [1] * 1000, 1000, 1.0),
        ([1.0] * 1001, [1] * 1001, 1000, 2.0),
    ],
)
def test_hand_worked_schedules(hours, widths, gpus, expected):
    assert makespan(hours, widths, gpus) == expected


def test_a_run_wider_than_the_fleet_is_refused():
    with pytest.raises(InputError, match=r"a run needs 4 GPUs .* there are 2"):
        makespan([1.0], [4], 2)


def test_expected_hours_foretell_the_makespan_of_a_simulated_fleet():
    """20 runs of 8 hours on 8 GPUs, one machine each: the mean of 100 fleets, played through."""
    spot = Interruptions(per_hour=0.1, interval_hours=0.5, checkpoint_hours=0.01, restart_hours=0.1)
    played = []
    for fleet in range(100):
        hours = [simulate(spot, 16, 1, seed=fleet * 100 + run)["total"] for run in range(20)]
        played.append(makespan(hours, [1] * 20, 8))
    foretold = makespan([spot.spent(8).total] * 20, [1] * 20, 8)
    assert np.mean(played) == pytest.approx(foretold, rel=0.03)
