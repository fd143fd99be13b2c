"""What a training worker does: build, restore, step, log, evaluate, checkpoint; finish with a summary.

Everything that a restart needs is a function of (seed, step): `run_worker` may be cut off anywhere and called
again with any number of workers.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from mpformer import atomic
from mpformer.config import Config, duration_in_steps
from mpformer.cores import usable_cores
from mpformer.data.pipeline import train_batches
from mpformer.data.records import Catalog
from mpformer.evaluate.evaluation import measure
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.pages import write_page
from mpformer.model.segmenter import Segmenter, build_model
from mpformer.model.weights.checkpoints import Checkpoint, latest
from mpformer.model.weights.loading import load_weights
from mpformer.ops.allocator import keep_freed_memory
from mpformer.tracking.progress import kept_warnings
from mpformer.tracking.run_dir import RunDir
from mpformer.tracking.tracker import Entry, Tracker
from mpformer.train import checkpoint
from mpformer.train.beside import Beside
from mpformer.train.execution import prepare
from mpformer.train.mirror import Mirror
from mpformer.train.optim import build_optimizer, rate_factor, set_rates
from mpformer.train.step import StepResult, train_step
from mpformer.train.summary import write_summary
from mpformer.train.timing import Timers
from mpformer.types import Batch, InputError, RunError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the driver hands to each worker."""

    config: Config
    run_dir: Path
    train: ray.ObjectRef
    """The training split's `Catalog`."""
    val: ray.ObjectRef
    token: str
    """Names this call of the driver, so that a failure it has been told of is not tried again."""
    entry: Entry
    mlflow_uri: str | None
    init: Path | None
    """The file of `train.init`; None: no such start, or the run has begun."""


@dataclass(frozen=True)
class Plan:
    """The lengths of a run in optimiser steps."""

    total: int
    checkpoint: int
    evaluate: int | None

    @classmethod
    def of(cls, config: Config, images: int) -> Plan:
        def steps(duration: str) -> int:
            return duration_in_steps(duration, images, config.train.batch_size)

        every = config.evaluate.every
        return cls(
            steps(config.train.length),
            steps(config.train.checkpoint_every),
            None if every is None else steps(every),
        )


def run_worker(settings: dict[str, Job]) -> None:
    """Entry point on every worker of Ray Train.

    A failure that a restart cannot mend is written to the run's `failure.json`; the restart that Ray then
    makes sees it and returns at once, and the driver raises it.
    """
    job = settings["job"]
    failure = RunDir(job.run_dir).failure
    if failure.exists() and json.loads(failure.read_text())["token"] == job.token:
        return
    try:
        with kept_warnings(job.run_dir):
            _Run(job).run()
    except (InputError, RunError) as error:
        _note(failure, {"token": job.token, "kind": type(error).__name__, "message": str(error)})
        raise


def _note(failure: Path, content: dict[str, str]) -> None:
    """Whole or not at all: a torn note on a full disk would stop the run when there is room again."""
    try:
        atomic.write_text(failure, json.dumps(content))
    except OSError as error:  # Ray then tries again what cannot work, and ends with the failure itself
        log.warning("%s: cannot be written: %s", failure, error.strerror)


class _Run:
    """One life of one worker."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.run_dir = job, job.config, job.run_dir
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            local = max(1, context.get_local_world_size())
            threads = self.config.cluster.threads or max(1, usable_cores() // local)
            torch.set_num_threads(threads)
            keep_freed_memory()
        self.train_split: Catalog = ray.get(job.train)
        self.val_split: Catalog = ray.get(job.val)
        self.plan = Plan.of(self.config, len(self.train_split.records))
        self.timers = Timers()
        self.skipped: list[str] = []
        uri = self.config.cluster.mirror
        self.mirror = Mirror(uri, self.run_dir) if uri else None
        self.beside: Beside | None = None
        self.warned = False

    def run(self) -> None:
        config = self.config
        torch.manual_seed(config.train.seed)
        with self.timers("restore"):
            found = self._latest_checkpoint()
        model = self._build_model(found is not None).to(self.device)
        optimizer = build_optimizer(model, config.train)
        with self.timers("restore"):
            start, self.train_seconds = self._restore(found, model, optimizer)
        prepare(model, config.train)
        wrapped = self._distribute(model)
        tracker = self._open_tracker(start)
        if tracker and config.cluster.evaluators:
            self.beside = Beside(self.run_dir, config, self.job.val, tracker)
        autocast = use_bfloat16(config.train.precision, self.device)
        try:
            if self.beside:
                self.beside.resume(start)
            if start == 0 and config.evaluate.at_start:
                self._evaluate(model, tracker, 0)
            self._train(wrapped, model, optimizer, tracker, start, autocast)
            skipped = self._gather(self.skipped)
            if tracker:
                write_summary(self.run_dir, config, self.plan.total, self.timers, self._resources(skipped))
                tracker.finish()
        except (InputError, RunError):
            if tracker:
                tracker.finish("FAILED")
            raise
        if tracker and self.mirror:
            self.mirror.finish()

    def _build_model(self, begun: bool) -> Segmenter:
        """With the weights that a run starts from; one that has begun has its own, and fetches none."""
        config, classes = self.config.model, self.train_split.classes
        if not begun and self.job.init is None:
            return build_model(config, classes)
        model = build_model(config.without_pretrained(), classes)
        if not begun:
            report = load_weights(model, self.job.init)
            if self.rank == 0:
                RunDir(self.run_dir).init.write_text(f"{self.job.init}\n{report}\n", encoding="utf-8")
        return model

    def _train(
        self,
        wrapped: nn.Module,
        model: Segmenter,
        optimizer: torch.optim.Optimizer,
        tracker: Tracker | None,
        start: int,
        autocast: bool,
    ) -> None:
        config, plan = self.config, self.plan
        wrapped.train()
        since = _Interval(start)
        for step, batch in self._batches(start):
            # every random stream starts anew from (seed, step): a restart needs no stored state of them
            torch.manual_seed((config.train.seed << 32) + step * self.world + self.rank)
            set_rates(optimizer, rate_factor(step, plan.total, config.train))
            result = train_step(
                wrapped,
                optimizer,
                batch,
                config,
                self.timers,
                classes=len(model.classes),
                autocast=autocast,
            )
            done = step + 1
            if done % config.train.log_every == 0 or done == plan.total:
                self._log_training(tracker, done, result, optimizer, since)
                since = _Interval(done)
            due = plan.evaluate is not None and done % plan.evaluate == 0
            if due or done == plan.total:
                self.train_seconds += since.pause()
                self._evaluate(model, tracker, done)
                wrapped.train()
                since.go_on()
            if done % plan.checkpoint == 0 or done == plan.total or self._is_first_warning(done):
                self.train_seconds += since.pause()
                self._checkpoint(model, optimizer, tracker, done)
                since.go_on()

    def _is_first_warning(self, done: int) -> bool:
        """Whether a machine of this run is about to be taken away, and no checkpoint was made of that yet.

        All workers ask together, whenever they log: it is a barrier between them.
        """
        if self.warned or done % self.config.train.log_every:
            return False
        self.warned = ray.train.get_preemption_info() is not None
        return self.warned

    def _batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        stream = train_batches(
            self.config.data,
            self.job.train,
            seed=self.config.train.seed,
            batch_size=self.config.train.batch_size,
            steps=range(start, self.plan.total),
            rank=self.rank,
            world=self.world,
        )
        for step in range(start, self.plan.total):
            with self.timers("data_wait"):
                batch = next(stream)
                self.skipped.extend(batch.skipped)
                batch = batch.to(self.device, non_blocking=True)
            yield step, batch

    def _latest_checkpoint(self) -> Checkpoint | None:
        if self.mirror:
            self._fetch()
        found, damaged = latest(self.run_dir)
        for line in damaged:
            print(line, flush=True)
        return found

    def _restore(
        self, found: Checkpoint | None, model: Segmenter, optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        """The step to go on from, and the seconds of training that led there."""
        if found is None:
            return 0, 0.0
        checkpoint.restore(found, model, optimizer)
        if self.rank == 0:
            self.skipped = list(found.state["skipped"])
        return found.step, found.state["train_seconds"]

    def _fetch(self) -> None:
        """The run from its mirror, one worker after the other: those of one machine share a folder."""
        for rank in range(self.world):
            if rank == self.rank:
                self.mirror.pull()
            if self.world > 1:
                dist.barrier()

    def _distribute(self, model: Segmenter) -> nn.Module:
        if self.world == 1:
            return model
        live_statistics = self.config.model.backbone.norm == "bn"
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=live_statistics,
            gradient_as_bucket_view=True,
        )

    def _open_tracker(self, start: int) -> Tracker | None:
        if self.rank != 0:
            return None
        progress = {"name": self.config.name, "start_step": start, "total_steps": self.plan.total}
        atomic.write_text(RunDir(self.run_dir).progress, json.dumps(progress))
        return Tracker.open(
            self.run_dir,
            self.config,
            start_step=start,
            entry=self.job.entry,
            mlflow_uri=self.job.mlflow_uri,
            run_name=f"{self.config.name}-s{self.config.train.seed}",
        )

    def _log_training(
        self,
        tracker: Tracker | None,
        done: int,
        result: StepResult,
        optimizer: torch.optim.Optimizer,
        since: _Interval,
    ) -> None:
        values = torch.stack([v.double() for v in result.losses.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
        seconds = since.pause()
        self.train_seconds += seconds
        steps = done - since.start
        if tracker:
            point = {f"train/{k}": v for k, v in zip(result.losses, values.tolist())}
            point["train/grad_norm"] = float(result.grad_norm)
            point["train/lr"] = max(group["lr"] for group in optimizer.param_groups)
            point |= {f"time/{k}": v / steps for k, v in self.timers.take().items()}
            point["speed/images_per_second"] = steps * self.config.train.batch_size / since.total
            point |= self._amounts(done)
            tracker.log(done, point)
        if self.beside:
            self.beside.collect(wait=False)

    def _amounts(self, done: int) -> dict[str, float]:
        amounts = {"speed/images_seen": float(done * self.config.train.batch_size)}
        amounts["speed/train_seconds"] = self.train_seconds
        if self.device.type == "cuda":
            amounts["speed/gpu_hours"] = self.train_seconds * self.world / 3600
        return amounts

    def _evaluate(self, model: Segmenter, tracker: Tracker | None, done: int) -> None:
        """Each worker predicts its part of the split; rank 0 puts them in order and measures.

        With `cluster.evaluators`, others do that while training goes on; but for the last evaluation.
        """
        if self.config.cluster.evaluators and done < self.plan.total:
            if self.beside:
                with self.timers("evaluate"):
                    tracker.log(done, self._amounts(done))
                    self.beside.submit(done, model)
            return
        model.eval()
        with self.timers("evaluate"):
            if self.beside:
                self.beside.collect()
            records = self.val_split.records[: self.config.evaluate.limit]
            indices = range(self.rank, len(records), self.world)
            mine = list(predict_records(model, self.val_split, self.config, indices, self.device))
            predictions = self._gather(mine)
            metrics: dict[str, float] = {}
            if tracker:
                evaluation = measure(predictions, self.val_split, self.config)
                metrics = evaluation.scores.summary
                tracker.log(done, {**evaluation.values(), **self._amounts(done)})
                if done == self.plan.total and self.config.evaluate.pictures:
                    title, count = f"{self.config.name}, step {done}", self.config.evaluate.pictures
                    write_page(RunDir(self.run_dir).pictures, title, evaluation, count=count)
        ray.train.report({"step": done, **{f"val/{k}": v for k, v in metrics.items()}})

    def _checkpoint(
        self, model: Segmenter, optimizer: torch.optim.Optimizer, tracker: Tracker | None, done: int
    ) -> None:
        with self.timers("checkpoint"):
            skipped = self._gather(self.skipped)
            if tracker:
                state = {"train_seconds": self.train_seconds, "skipped": skipped}
                checkpoint.save(self.run_dir, done, model, optimizer, self.config, state)
                tracker.commit(done)
                if self.beside:
                    self.beside.committed()
                if self.mirror:
                    self.mirror.push()

    def _gather(self, items: list[Any]) -> list[Any]:
        """All workers' items in rank order on rank 0; an empty list elsewhere."""
        if not dist.is_initialized() or self.world == 1:
            return items
        parts: list[list[Any]] | None = [[] for _ in range(self.world)] if self.rank == 0 else None
        dist.gather_object(items, parts)
        return [item for part in parts for item in part] if parts is not None else []

    def _resources(self, skipped: list[str]) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "workers": self.world,
            "threads": torch.get_num_threads(),
            "train_seconds": self.train_seconds,
            "images_per_second": self.plan.total
            * self.config.train.batch_size
            / max(self.train_seconds, 1e-9),
            "peak_memory_bytes": peak_kib * 1024,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "bad_samples": skipped,
        }


class _Interval:
    """Seconds of training since a step, pauses for evaluation and checkpoints left out."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.total = 0.0
        self._from: float | None = time.perf_counter()

    def pause(self) -> float:
        """Stop the clock; the seconds since it last started."""
        seconds = 0.0 if self._from is None else time.perf_counter() - self._from
        self._from = None
        self.total += seconds
        return seconds

    def go_on(self) -> None:
        self._from = time.perf_counter()


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to run the forward in bfloat16 autocast: as asked for, or by itself on GPUs that have it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"
