"""One training step, top to bottom in the order of the paper: read this first. No Ray, tracker, data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpformer.config import Config
from mpformer.model.losses import (
    Normalizers,
    consistency_losses,
    count_for_normalizers,
    matching_losses,
    per_pixel_losses,
    pilot_losses,
)
from mpformer.model.matcher import NonFiniteError, match, match_pilots
from mpformer.model.piloting import make_pilots
from mpformer.model.streams import SampleRandom
from mpformer.train.timing import Timers
from mpformer.types import Batch, Output, Pilots


@dataclass(frozen=True)
class StepResult:
    """What one step computed on this worker."""

    losses: dict[str, Tensor]
    """Weighted losses by name ('loss', 'loss_mask', 'pilot_loss_mask', 'head_3/loss_mask', ...), detached
    scalars: this worker's share, so that the sum over all workers is the loss of the global batch."""
    grad_norm: Tensor
    """Norm of the gradient before clipping, the same on all workers."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    timers: Timers,
    *,
    classes: int,
    autocast: bool = False,
) -> StepResult:
    """Update the model on this worker's share of one global batch.

    `model` is a `Segmenter`, bare or in DistributedDataParallel; `batch` lies on its device. The share is
    cut into micro-batches of `train.micro_batch` images, whose gradients add up to that of the global batch
    exactly. Raises `NonFiniteError` on every worker, before the weights change, if a loss or the gradient
    is not finite anywhere.
    """
    micro_batches = batch.split(config.train.micro_batch or len(batch))
    normalizers = _global_normalizers(micro_batches, config, classes, batch.images.device)
    losses: dict[str, Tensor] = {}
    for micro in micro_batches:
        last = micro is micro_batches[-1]
        seed, device = config.train.seed, micro.images.device
        draws = SampleRandom(seed, "matching", micro.positions, device)
        pilot_draws = SampleRandom(seed, "pilots", micro.positions, device)
        failure = None
        with _gradients_stay_local(model, unless=last):
            with timers("pilots"):
                pilots = make_pilots(micro.targets, config.model, classes, pilot_draws)
            with (
                timers("forward"),
                torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            ):
                output = model(micro.images, pilots)
            try:
                parts = _losses(output, pilots, micro, normalizers, config, draws, pilot_draws, timers)
                total = torch.stack(list(parts.values())).sum()
                if not torch.isfinite(total):
                    failure = f"losses of images {', '.join(micro.image_ids)} not finite: {_worst(parts)}"
            except NonFiniteError as error:
                failure = str(error)
            if last or failure:
                _agree_to_go_on(failure, device)
            with timers("backward"):
                # DistributedDataParallel averages over workers; the losses are shares of one sum
                (total * _world_size()).backward()
        for name, part in {"loss": total, **parts}.items():
            losses[name] = losses.get(name, 0) + part.detach()
    with timers("optimizer"):
        limit = config.train.clip_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not torch.isfinite(grad_norm):
            raise NonFiniteError(
                f"backward: the gradient of images {', '.join(batch.image_ids)} is not finite"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepResult(losses, grad_norm)


def _losses(
    output: Output,
    pilots: Pilots | None,
    batch: Batch,
    normalizers: Normalizers,
    config: Config,
    draws: SampleRandom,
    pilot_draws: SampleRandom,
    timers: Timers,
) -> dict[str, Tensor]:
    """Weighted losses of all heads; those of the last head have no 'head_i/' before their name.

    Head i stands after layer i, head 0 before layer 1.
    """
    targets, valid_sizes, settings = batch.targets, batch.valid_sizes, config.model.loss
    layers = config.model.decoder.layers
    names = [f"head_{layer}/" for layer in range(layers + 1 - len(output.heads), layers)] + [""]
    losses: dict[str, Tensor] = {}
    if config.model.output == "per_pixel":
        with timers("losses"):
            for name, head in zip(names, output.heads):
                parts = per_pixel_losses(head, targets, normalizers, settings)
                losses.update({f"{name}loss_{kind}": value for kind, value in parts.items()})
        return losses
    last_matches = None
    if settings.matching == "last_head":
        with timers("match"):
            last_matches = match(output.heads[-1], targets, settings, draws, valid_sizes, batch.image_ids)
    for name, head in zip(names, output.heads):
        with timers("match"):
            matches = last_matches or match(head, targets, settings, draws, valid_sizes, batch.image_ids)
        with timers("losses"):
            parts = matching_losses(head, targets, matches, normalizers, settings, draws, valid_sizes)
            losses.update({f"{name}loss_{kind}": value for kind, value in parts.items()})
    for name, head in zip(names, output.pilots or ()):
        objects = pilots.objects
        if config.model.pilot.assignment == "match":
            with timers("match"):
                objects = match_pilots(
                    head, pilots, targets, settings, pilot_draws, valid_sizes, batch.image_ids
                )
        with timers("losses"):
            parts = pilot_losses(
                head, pilots, objects, targets, normalizers, settings, pilot_draws, valid_sizes
            )
            losses.update({f"{name}pilot_loss_{kind}": value for kind, value in parts.items()})
    if settings.consistency_weight:
        with timers("losses"):
            size = (batch.images.shape[2], batch.images.shape[3])
            values = consistency_losses(output.heads, normalizers, settings, draws, valid_sizes, size)
            losses.update({f"{name}loss_consistency": value for name, value in zip(names[1:], values)})
    return losses


def _global_normalizers(
    micro_batches: Sequence[Batch], config: Config, classes: int, device: torch.device
) -> Normalizers:
    """Sums over all workers and micro-batches, known from the targets before the forward."""
    counts = [count_for_normalizers(micro.targets, config.model, classes) for micro in micro_batches]
    total = torch.tensor(counts, dtype=torch.float64, device=device).sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
    return Normalizers(*total.clamp(min=1).tolist())


def _agree_to_go_on(failure: str | None, device: torch.device) -> None:
    """Stop all workers together if one of them has failed, before any gradient is exchanged."""
    failed = torch.tensor(float(failure is not None), device=device)
    if dist.is_initialized():
        dist.all_reduce(failed)
    if failed:
        raise NonFiniteError(failure or "another worker met a number that is not finite")


def _worst(parts: dict[str, Tensor]) -> str:
    return ", ".join(name for name, value in parts.items() if not torch.isfinite(value))


@contextlib.contextmanager
def _gradients_stay_local(model: nn.Module, *, unless: bool) -> Iterator[None]:
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    with model.no_sync() if distributed and not unless else contextlib.nullcontext():
        yield


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
