"""What a training worker does: build, restore, step, log, evaluate, checkpoint; finish with a summary.

Everything that a restart needs is a function of (seed, step): `run_worker` may be interrupted at any moment
and called again with any number of workers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from mpformer import atomic
from mpformer.config import Config
from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.cores import usable_cores
from mpformer.data.pipeline import train_batches
from mpformer.data.records import Catalog
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.prediction import Prediction
from mpformer.model.architecture import Architecture, build_model
from mpformer.model.weights.checkpoints import MODEL_FILE, Checkpoint, latest
from mpformer.model.weights.loading import load_weights, normalized_as
from mpformer.ops.allocator import keep_freed_memory
from mpformer.tracking.progress import kept_warnings
from mpformer.tracking.run_dir import RunDir
from mpformer.train import checkpoint
from mpformer.train.ahead import on_device
from mpformer.train.ema import WeightAverage
from mpformer.train.execution import prepare, use_bfloat16
from mpformer.train.group import Group
from mpformer.train.job import Job, StepPlan
from mpformer.train.memory import explained
from mpformer.train.mirror import open_mirror
from mpformer.train.optim import build_optimizer, rate_factor, set_rates
from mpformer.train.profiling import profiled_steps
from mpformer.train.reporter import Reporter, SilentReporter
from mpformer.train.step import StepResult, train_step
from mpformer.train.summary import forget_other_runs, measured_resources, peak_device_memory
from mpformer.train.timing import Clock, Timers
from mpformer.train.utilization import Utilization
from mpformer.types import Batch, ClassTable, InputError, RunError

log = logging.getLogger(__name__)


def run_worker(settings: dict[str, Job]) -> None:
    """Entry point on every worker of Ray Train.

    A failure that a restart cannot mend is written to the run's `failure.json`; the restart that Ray then
    makes finds it and returns at once, and the driver raises it.
    """
    job = settings["job"]
    failure = RunDir(job.run_dir).failure
    if failure.exists() and json.loads(failure.read_text())["token"] == job.token:
        return
    timers = Timers()
    try:
        forget_other_runs()
        with kept_warnings(job.run_dir), explained(timers, job.config):
            train(job, timers)
    except (InputError, RunError) as error:
        _write_failure(failure, {"token": job.token, "kind": type(error).__name__, "message": str(error)})
        raise


def _write_failure(path: Path, content: dict[str, str]) -> None:
    """Replace the file as a whole: half a file, of a full disk, would stop every later start of the run."""
    try:
        atomic.write_text(path, json.dumps(content))
    except OSError as error:  # Ray then restarts the run in vain and ends with the failure itself
        log.warning("%s: cannot be written: %s", path, error.strerror)


@dataclass
class _Run:
    """What one worker holds between its steps."""

    job: Job
    group: Group
    plan: StepPlan
    val: Catalog
    model: Architecture
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """With `train.ema`."""
    reporter: SilentReporter
    """Rank 0's `Reporter`; on the other ranks it does nothing."""
    timers: Timers
    clock: Clock
    utilization: Utilization | None
    skipped: list[str]
    """One line per bad sample that was replaced; on rank 0 those before the restart, too."""
    logged: int
    """Step of the last point of training; at first the step that the run goes on from."""

    @property
    def config(self) -> Config:
        return self.job.config


def train(job: Job, timers: Timers) -> None:
    """Train a run from its newest checkpoint to its end, as one of its workers."""
    config, group = job.config, _join(job.config, job.use_gpu)
    train_split: Catalog = ray.get(job.train)
    val_split: Catalog = ray.get(job.val)
    plan = StepPlan.of(config, len(train_split.records))
    mirror = open_mirror(config, job.run_dir)

    torch.manual_seed(config.train.seed)
    with timers("restore"):
        group.in_turn(mirror.pull)
        found, damaged = latest(job.run_dir)
        for line in damaged:
            print(line, flush=True)
    if found is None and job.begun is not None:
        raise RunError(
            f"{job.run_dir}: the checkpoint of step {job.begun} is not to be found on this machine: the "
            "workers need the folder of the runs, or cluster.mirror"
        )
    model, init_report = _build_model(job, train_split.classes, found)
    model = model.to(group.device)
    optimizer = build_optimizer(model, config.train)
    start, seconds, skipped = 0, 0.0, []
    if found is not None:
        with timers("restore"):
            checkpoint.restore(found, model, optimizer)
        start, seconds = found.step, found.state["train_seconds"]
        skipped = list(found.state["skipped"]) if group.rank == 0 else []
    prepare(model, config.train)
    wrapped = _distribute(model, group)
    average = None
    if config.train.ema is not None:
        average = checkpoint.restored_average(found, model, config.train.ema)

    reporter = SilentReporter()
    if group.rank == 0:
        reporter = Reporter(job, plan, start, val_split, init_report, mirror)
    clock = Clock(seconds)
    run = _Run(
        job,
        group,
        plan,
        val_split,
        model,
        optimizer,
        average,
        reporter,
        timers,
        clock,
        Utilization.of(model, config, group),
        skipped,
        logged=start,
    )
    try:
        with explained(timers, config):
            reporter.resume_evaluations(start)
            if start == 0 and config.evaluate.at_start:
                _evaluate(run, 0)
            end = start if start and _stops(run, start) else _train_steps(run, wrapped, start)
            skipped = group.gather(run.skipped)
            images = end * config.train.batch_size
            reporter.finish(end, timers, measured_resources(group, clock.total, images, skipped))
    except (InputError, RunError):
        reporter.fail()
        raise
    reporter.finish_mirror()


def _train_steps(run: _Run, wrapped: nn.Module, start: int) -> int:
    """Train from a step on; the step at which training has ended."""
    config, plan, group = run.config, run.plan, run.group
    autocast = use_bfloat16(config.train.precision, group.device)
    preemption = _Preemption()
    wrapped.train()
    run.clock.start()
    profiled = config.train.profile if group.rank == 0 else 0
    with profiled_steps(profiled, RunDir(run.job.run_dir), group.device, run.timers, start) as profiler:
        for step, batch in _batches(run, start):
            # every random stream starts anew from (seed, step): a restart needs no stored state of them
            torch.manual_seed((config.train.seed << 32) + step * group.world + group.rank)
            run.model.set_progress(step / plan.total)
            set_rates(run.optimizer, rate_factor(step, plan.total, config.train))
            with explained(run.timers, config, batch):
                result = train_step(
                    wrapped,
                    run.optimizer,
                    batch,
                    config,
                    run.timers,
                    classes=len(run.model.classes),
                    autocast=autocast,
                )
            done = step + 1
            if run.average is not None:
                with run.timers("average"):
                    run.average.update(done)
            if plan.logs(done):
                _log(run, done, result)
            if plan.evaluates(done):
                _evaluate(run, done)
            if plan.saves(done) or (done % plan.log_every == 0 and preemption.is_new()):
                _save(run, done)
            profiler.step()
            if _stops(run, done):
                return done
    return plan.total


def _stops(run: _Run, done: int) -> bool:
    """Whether training ends after a step, before its length (`train.stop_early`). All workers agree."""
    if run.config.train.stop_early is None or not run.plan.evaluates(done):
        return False
    return run.group.any(run.reporter.stops_early(done))


def _batches(run: _Run, start: int) -> Iterator[tuple[int, Batch]]:
    """(step, this worker's share of its global batch, on the device), steps counted from 0."""
    config, group = run.config, run.group
    stream = train_batches(
        config.data,
        run.job.train,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        steps=range(start, run.plan.total),
        rank=group.rank,
        world=group.world,
    )
    batches = on_device(stream, group.device)
    for step in range(start, run.plan.total):
        with run.timers("data_wait"):
            batch, skipped = next(batches)
            run.skipped.extend(skipped)
        yield step, batch


def _log(run: _Run, done: int, result: StepResult) -> None:
    losses = run.group.sum(result.losses)
    with run.clock.paused():
        steps, run.logged = done - run.logged, done
        speed = steps * run.config.train.batch_size / run.clock.lap()
        values = {
            "train/grad_norm": float(result.grad_norm),
            "train/lr": max(group["lr"] for group in run.optimizer.param_groups),
            **{f"time/{name}": value / steps for name, value in run.timers.take().items()},
            "speed/images_per_second": speed,
            "speed/peak_memory_gib": peak_device_memory(run.group.device) / 2**30,
            **_amounts(run, done),
        }
        if run.utilization is not None:
            values["speed/mfu"] = run.utilization.at(speed)
        run.reporter.training(done, losses, values)


def _amounts(run: _Run, done: int) -> dict[str, float]:
    amounts = {
        "speed/images_seen": float(done * run.config.train.batch_size),
        "speed/train_seconds": run.clock.total,
    }
    if run.group.device.type == "cuda":
        amounts["speed/gpu_hours"] = run.clock.total * run.group.world / 3600
    return amounts


def _evaluate(run: _Run, done: int) -> None:
    """Each worker predicts its share of the split; rank 0 puts the predictions in order and scores them.

    With `cluster.evaluators` they do that instead while training goes on, except for the last evaluation.
    """
    config, model = run.config, run.model
    with run.clock.paused(), run.timers("evaluate"):
        if config.cluster.evaluators and not run.plan.is_last(done):
            run.reporter.evaluate_in_background(done, model, _amounts(run, done))
            return
        training = model.training
        model.eval()
        run.reporter.finish_evaluations()
        predictions = {PLAIN: _predict(run)}
        if run.average is not None:
            with run.average.in_place():
                predictions[AVERAGED] = _predict(run)
        figures = run.reporter.evaluated(done, predictions, _amounts(run, done))
        model.train(training)
        ray.train.report({"step": done, **figures})


def _predict(run: _Run) -> list[Prediction]:
    """The predictions of the validation split, on rank 0; each worker makes its share."""
    config, group = run.config, run.group
    images = len(run.val.records[: config.evaluate.limit])
    mine = range(group.rank, images, group.world)
    return group.gather(list(predict_records(run.model, run.val, config, mine, group.device)))


def _save(run: _Run, done: int) -> None:
    with run.clock.paused(), run.timers("checkpoint"):
        skipped = run.group.gather(run.skipped)
        state = {"train_seconds": run.clock.total, "skipped": skipped}
        run.reporter.save(done, run.model, run.optimizer, state, run.average)


class _Preemption:
    """Whether a machine of the run is about to be taken away."""

    def __init__(self) -> None:
        self._seen = False

    def is_new(self) -> bool:
        """True at the first call after it was announced. A barrier: all workers call it at the same step."""
        if self._seen:
            return False
        self._seen = ray.train.get_preemption_info() is not None
        return self._seen


def _join(config: Config, use_gpu: bool) -> Group:
    """This worker in its group; on the CPU with its share of the machine's cores."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if use_gpu else torch.device("cpu")
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        workers_here = max(1, context.get_local_world_size())
        torch.set_num_threads(config.cluster.threads or max(1, usable_cores() // workers_here))
        keep_freed_memory()
    return Group(context.get_world_rank(), context.get_world_size(), device)


def _build_model(job: Job, classes: ClassTable, begun: Checkpoint | None) -> tuple[Architecture, str | None]:
    """The model with the weights that a run starts from, and what was loaded from `train.init`.

    A run that has begun has weights of its own: none are fetched or loaded for it here.
    """
    config = job.config.model
    if begun is not None:
        return build_model(normalized_as(begun.path / MODEL_FILE, config), classes), None
    if job.init is None:
        return build_model(config, classes), None
    if config.backbone.mean is None:
        config = normalized_as(job.init, config)
    model = build_model(config.without_pretrained(), classes)
    return model, f"{job.init}\n{load_weights(model, job.init)}\n"


def _distribute(model: Architecture, group: Group) -> nn.Module:
    if group.world == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[group.device] if group.device.type == "cuda" else None,
        broadcast_buffers=model.has_live_statistics(),
        gradient_as_bucket_view=True,
    )
