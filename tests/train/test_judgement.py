"""What the figures of evaluations decide: bad choices are refused, an early end follows from the record."""

from pathlib import Path

import pytest

from mpformer.config import Config
from mpformer.tracking.lineage import Parent
from mpformer.tracking.record import RecordWriter
from mpformer.train import judgement
from mpformer.types import InputError


def config(train: dict | None = None, **sections) -> Config:
    return Config.model_validate({"train": train or {}, **sections})


@pytest.mark.parametrize(
    ("train", "sections", "message"),
    [
        ({"keep": {"best": "val/APP"}}, {}, r"train\.keep\.best: .* val/APP; nearest: val/AP$"),
        ({"keep": {"best": "val/PQ"}}, {}, "has val/PQ; nearest"),  # of an instance task
        ({"keep": {"best": "val/loss"}}, {}, r"it needs evaluate\.loss=true$"),
        ({"keep": {"best": "val/AP_boundary"}}, {}, r"it needs evaluate\.boundary=true$"),
        (
            {"stop_early": {"metric": "val_ema/AP", "patience": 2}},
            {},
            r"train\.stop_early\.metric: .*; it needs train\.ema$",
        ),
        (
            {"stop_early": {"metric": "val/AP", "patience": 2}},
            {"cluster": {"evaluators": 1}, "evaluate": {"every": "1 step"}},
            r"train\.stop_early needs cluster\.evaluators=0",
        ),
        ({"ema": 0.9}, {"cluster": {"evaluators": 1}}, r"train\.ema needs cluster\.evaluators=0"),
        (
            {"stop_early": {"metric": "val/AP", "patience": 2}},
            {"evaluate": {"every": None}},
            r"train\.stop_early needs evaluate\.every",
        ),
        (
            {"keep": {"best": "val_ema/count_error"}},
            {"evaluate": {"metrics": ["my.metrics:Count"]}},
            r"val_ema/count_error needs train\.ema",
        ),
    ],
)
def test_a_figure_that_no_evaluation_will_have_is_refused_before_training(train, sections, message):
    with pytest.raises(InputError, match=message):
        judgement.check(config(train, **sections))


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ({}, {"cluster": {"evaluators": 1}}),
        ({"keep": {"best": "val/AP"}}, {"cluster": {"evaluators": 1}}),
        ({"keep": {"best": "val/loss_mask"}}, {"evaluate": {"loss": True}}),
        ({"keep": {"best": "val_ema/AP50"}, "ema": 0.99}, {}),
        ({"keep": {"best": "val/count_error"}}, {"evaluate": {"metrics": ["my.metrics:Count"]}}),
    ],
)
def test_what_will_be_measured_is_taken(train, sections):
    judgement.check(config(train, **sections))


def test_what_the_data_have_nothing_of_is_said_at_the_first_evaluation():
    chosen = config({"keep": {"best": "val/AP_large"}})
    judgement.check_measured(chosen, {"val/AP_large": 3.0})
    with pytest.raises(InputError, match=r"keep\.best: the evaluation has no val/AP_large; it has val/AP$"):
        judgement.check_measured(chosen, {"val/AP": 3.0, "diag/layer_iou_1": 1.0})


def ends(run_dir: Path, values: list[float | None], patience: int, key: str = "val/AP") -> int | None:
    """At which evaluation, counted from 1, a run with these figures ends; None: at none."""
    rule = config({"stop_early": {"metric": key, "patience": patience}}, evaluate={"loss": True})
    writer = RecordWriter(run_dir, 0)
    for number, value in enumerate(values, 1):
        writer.add(10 * number, {"train/loss": 1.0, **({} if value is None else {key: value})})
        if judgement.stops_early(run_dir, rule, 10 * number):
            return number
    return None


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "patience", "end"),
    [
        ([1, 2, 3, 4], 1, None),
        ([1, 2, 2, 3], 1, 3),  # as good is not better
        ([5, 4, 3, 6, 5, 5, 5], 3, 7),
        ([5, 4, 6, 5, 7, 6, 6], 2, 7),
        ([5, NAN, NAN], 2, 3),  # what is not a number is not better
        ([NAN, 5, 6], 2, None),
        ([5, None, 4, 4], 2, 4),  # where it was not measured nothing counts
        ([], 1, None),
    ],
)
def test_training_ends_so_many_evaluations_after_the_best(tmp_path, values, patience, end):
    assert ends(tmp_path, values, patience) == end


def test_of_losses_the_smallest_is_the_best(tmp_path):
    assert ends(tmp_path, [5.0, 4.0, 3.0, 3.5, 3.25], 2, "val/loss") == 5


def test_a_restart_decides_as_if_there_had_been_none(tmp_path):
    rule = config({"stop_early": {"metric": "val/AP", "patience": 2}})
    first = RecordWriter(tmp_path, 0)
    for step, value in ((10, 5.0), (20, 4.0), (30, 3.0)):
        first.add(step, {"val/AP": value})
    why = judgement.stops_early(tmp_path, rule, 30)
    assert why == "no better val/AP in 2 evaluations after step 10"
    again = RecordWriter(tmp_path, 20)  # step 30 is void now
    assert judgement.stops_early(tmp_path, rule, 20) is None
    again.add(30, {"val/AP": 3.0})
    assert judgement.stops_early(tmp_path, rule, 30) == why
    assert judgement.stops_early(tmp_path, config(), 30) is None


def test_a_run_that_goes_on_from_another_has_its_own_patience_but_not_its_own_best(tmp_path):
    rule = config({"stop_early": {"metric": "val/AP", "patience": 2}})
    writer = RecordWriter(tmp_path, 0)
    for step, value in ((10, 5.0), (20, 4.0), (30, 3.0), (40, 4.0), (50, 4.5)):
        writer.add(step, {"val/AP": value})
    Parent("other", 30).write(tmp_path)
    assert [judgement.stops_early(tmp_path, rule, step) is not None for step in (30, 40, 50)] == [
        *(False, False, True)
    ]
