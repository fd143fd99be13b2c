"""`train.profile`: which steps the trace holds, and what of them."""

import gzip
import json

import pytest
import torch

from mpformer.model.architecture import build_model
from mpformer.tracking.run_dir import RunDir
from mpformer.train.optim import build_optimizer
from mpformer.train.profiling import UNTIMED, WARM_UP, profiled_steps
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from tests.train.conftest import make_batch

CPU = torch.device("cpu")


def ranges(path, names):
    """How often each name is a range of the trace."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: found.count(name) for name in names}


@pytest.mark.parametrize(("length", "recorded"), [(UNTIMED + WARM_UP + 5, 2), (UNTIMED + WARM_UP + 1, 1)])
def test_the_trace_holds_so_many_steps_after_warm_up(tmp_path, length, recorded):
    """Also where the run ends before that many."""
    timers, files = Timers(), RunDir(tmp_path)
    with profiled_steps(2, files, CPU, timers, start=100) as profiler:
        for _ in range(length):
            with timers("forward"):
                torch.ones(3).sum()
            profiler.step()
    assert [file.name for file in tmp_path.iterdir()] == ["trace-00000110.json.gz"]
    assert ranges(files.trace(110), ["forward"]) == {"forward": recorded}


def test_a_run_too_short_to_warm_up_leaves_no_trace(tmp_path):
    with profiled_steps(2, RunDir(tmp_path), CPU, Timers(), start=0) as profiler:
        for _ in range(UNTIMED):
            profiler.step()
    assert not list(tmp_path.iterdir())


def test_phases_of_a_step_are_ranges_of_the_trace(tmp_path, tiny_config):
    model = build_model(tiny_config.model, 3).train()
    optimizer, timers = build_optimizer(model, tiny_config.train), Timers()
    with profiled_steps(1, RunDir(tmp_path), CPU, timers, start=0) as profiler:
        for _ in range(UNTIMED + WARM_UP + 2):
            train_step(model, optimizer, make_batch([2]), tiny_config, timers, classes=3)
            profiler.step()
    phases = ("pilots", "forward", "match", "losses", "backward", "optimizer")
    assert ranges(RunDir(tmp_path).trace(UNTIMED + WARM_UP), phases) == dict.fromkeys(phases, 1)


def test_nothing_is_recorded_or_annotated_unless_asked_for(tmp_path):
    timers = Timers()
    with profiled_steps(0, RunDir(tmp_path), CPU, timers, start=0) as profiler:
        profiler.step()
    assert timers.annotate is None
    assert not list(tmp_path.iterdir())
