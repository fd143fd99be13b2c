"""Memory that is exhausted: whatever the phase and whoever says so, one line with what helps."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mpformer.evaluate.evaluation import peak_memory
from mpformer.model.architecture import build_model
from mpformer.train.memory import explained
from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.train.summary import forget_other_runs
from mpformer.train.timing import Timers
from mpformer.types import RunError
from tests.train.conftest import make_batch
from tests.train.test_step import CLASSES, settings

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 268435456 bytes. Error code 12 (Cannot allocate memory)"
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


class Exhausted(Timers):
    """Timers in one phase of which memory is exhausted."""

    def __init__(self, phase, error):
        super().__init__()
        self.where, self.error = phase, error

    @contextlib.contextmanager
    def __call__(self, name):
        with super().__call__(name):
            if name == self.where:
                raise self.error
            yield


def told(timers, config, batch=None):
    def run():
        with explained(timers, config, batch):
            if batch is None:
                with timers(timers.where):
                    raise AssertionError("unreachable")
            model = build_model(config.model, CLASSES).train()
            train_step(model, build_optimizer(model, config.train), batch, config, timers, classes=CLASSES)

    with pytest.raises(RunError) as failure:
        run()
    assert failure.value.__cause__ is timers.error
    line = str(failure.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("phase", ["pilots", "forward", "match", "losses", "backward", "optimizer"])
def test_a_step_says_phase_images_objects_and_what_helps(phase):
    line = told(Exhausted(phase, CUDA), settings(), make_batch([3, 0, 20]))
    assert line.startswith(f"out of memory in the phase '{phase}' (2.50 GiB asked for): ")
    assert "3 images with 23 objects: image-0 (3), image-1 (0), image-2 (20); " in line
    assert "train.micro_batch=1 (now 3;" in line
    assert "train.activation_checkpointing=true" in line
    assert "data.augment (now 64x64" in line


def test_only_what_is_left_to_do_is_advised():
    config = settings()
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch": 1, "activation_checkpointing": True})}
    )
    line = told(Exhausted("forward", CUDA), config, make_batch([1] * 10))
    assert "micro_batch" not in line
    assert "activation_checkpointing" not in line
    assert line.count("image-") == 8
    assert "and 2 more; " in line
    assert "data.augment" in line


@pytest.mark.parametrize(
    ("phase", "advice"), [("evaluate", "data.test_resize"), ("data_wait", "cluster.workers"), ("restore", "")]
)
def test_outside_of_a_step(phase, advice):
    line = told(Exhausted(phase, CUDA), settings())
    assert f"phase '{phase}'" in line
    assert advice in line


@pytest.mark.parametrize(
    ("error", "asked"),
    [(CPU, "(268435456 bytes asked for)"), (CUBLAS, "'match': "), (MemoryError(), "'match': ")],
    ids=["cpu", "cublas", "python"],
)
def test_every_allocator_is_understood(error, asked):
    assert asked in told(Exhausted("match", error), settings(), make_batch([1]))


def test_a_real_allocation_that_no_machine_can_make():
    timers = Timers()
    with pytest.raises(RunError, match="phase 'forward'"), explained(timers, settings()), timers("forward"):
        torch.empty(1 << 60)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shape"), explained(Timers(), settings()):
        raise RuntimeError("shape '[3]' is invalid for input of size 4")


def test_the_phase_is_the_innermost_one_and_ends():
    timers = Timers()
    with timers("evaluate"):
        with timers("forward"):
            assert timers.phase == "forward"
        assert timers.phase == "evaluate"
    assert timers.phase == "start"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone counts peaks anew")
def test_the_peak_of_an_earlier_run_is_forgotten():
    before = np.ones(300 << 20, np.uint8)
    high = peak_memory()
    assert high > before.nbytes
    del before
    assert peak_memory() > high - (50 << 20)  # it counts in batches
    forget_other_runs()
    assert peak_memory() < high - (200 << 20)
