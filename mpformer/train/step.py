"""One training step, top to bottom in the order of the paper: read this first. No Ray, tracker, data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpformer.config import Config
from mpformer.config.model import Loss as LossConfig
from mpformer.model.architecture import Architecture, Structure
from mpformer.model.losses import (
    Normalizers,
    consistency_losses,
    count_for_normalizers,
    matching_losses,
    per_pixel_losses,
    pilot_losses,
)
from mpformer.model.matcher import NonFiniteError
from mpformer.model.matching import Matching, match_heads
from mpformer.model.piloting import make_pilots
from mpformer.model.streams import SampleRandom
from mpformer.model.transfer import to_host
from mpformer.train.timing import Timers
from mpformer.types import Batch, Output


@dataclass(frozen=True)
class StepResult:
    """What one step computed on this worker."""

    losses: dict[str, Tensor]
    """Weighted losses by name, detached scalars: this worker's share, so that the sum over all workers is
    the loss of the global batch.

    'loss' is the sum of the matching part's terms ('loss_mask', 'head_3/loss_mask', ...) and 'pilot_loss',
    with pilots, that of the mask-piloted part's ('pilot_loss_mask', ...).
    """
    total: Tensor
    """The loss that is optimised: the sum of all terms."""
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

    `model` is an `Architecture` for that many `classes`, bare or in DistributedDataParallel; `batch` is on
    its device. The share is split into micro-batches of `train.micro_batch` images, whose gradients add up
    exactly to that of the global batch. Raises `NonFiniteError` on every worker, before the weights change,
    if a loss or the gradient is not finite on any of them.
    """
    seed, device = config.train.seed, batch.images.device
    structure = _structure(model, classes)
    micro_batches = batch.split(config.train.micro_batch or len(batch))
    normalizers = _global_normalizers(micro_batches, config, structure)
    checks: list[_Check] = []
    terms: dict[str, Tensor] = {}
    for micro in micro_batches:
        draws = SampleRandom(seed, "matching", micro.positions, device)
        pilot_draws = SampleRandom(seed, "pilots", micro.positions, device)
        with _gradients_stay_local(model, unless=micro is micro_batches[-1]):
            with timers("pilots"):
                pilots = make_pilots(micro.targets, config.model.pilot, structure, pilot_draws)
            with (
                timers("forward"),
                torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            ):
                output = model(micro.images, pilots)
            with timers("match"):
                matching = match_heads(output, pilots, micro, config.model, draws, pilot_draws)
            with timers("losses"):
                losses = _losses(output, matching, micro, normalizers, config.model.loss, structure, draws)
                loss = torch.stack(list(losses.values())).sum()
            with timers("backward"):
                # DistributedDataParallel averages over workers; the losses are shares of one sum
                (loss * _world_size()).backward()
        detached = {name: value.detach() for name, value in losses.items()}
        failure = matching.failure if matching else None
        checks.append(_Check(micro.image_ids, loss.detach(), detached, failure))
        terms = {name: terms[name] + value for name, value in detached.items()} if terms else detached
    with timers("optimizer"):
        limit = config.train.clip_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        _stop_unless_finite(checks, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    total = torch.stack([check.loss for check in checks]).sum()
    return StepResult({**_sums(terms), **terms}, total, grad_norm)


def _sums(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of the matching part and, with pilots, of the mask-piloted part."""
    pilots = [value for name, value in terms.items() if "pilot_loss_" in name]
    matching = [value for name, value in terms.items() if "pilot_loss_" not in name]
    sums = {"loss": torch.stack(matching).sum()}
    return sums | {"pilot_loss": torch.stack(pilots).sum()} if pilots else sums


def _losses(
    output: Output,
    matching: Matching | None,
    batch: Batch,
    normalizers: Normalizers,
    config: LossConfig,
    structure: Structure,
    draws: SampleRandom,
) -> dict[str, Tensor]:
    """Weighted losses of all heads; those of the last head have no 'head_3/' before their name."""
    prefixes = structure.head_prefixes
    losses: dict[str, Tensor] = {}

    def add(name: str, terms: dict[str, Tensor]) -> None:
        losses.update({f"{name}_{term}": value for term, value in terms.items()})

    if matching is None:
        for prefix, head in zip(prefixes, output.heads):
            add(f"{prefix}loss", per_pixel_losses(head, batch.targets, normalizers, config))
        return losses
    matched = zip(prefixes, output.heads, matching.heads, matching.points)
    for prefix, head, matches, points in matched:
        add(f"{prefix}loss", matching_losses(head, batch, matches, normalizers, config, points.losses))
    if matching.piloted and output.pilots:
        pilots = matching.piloted.pilots
        piloted = zip(prefixes, output.pilots, matching.piloted.objects, matching.piloted.points)
        for prefix, head, objects, points in piloted:
            terms = pilot_losses(head, pilots, objects, batch, normalizers, config, points.losses)
            add(f"{prefix}pilot_loss", terms)
    if config.consistency_weight:
        values = consistency_losses(output.heads, batch, normalizers, config, draws)
        for prefix, value in zip(prefixes[1:], values):
            add(f"{prefix}loss", {"consistency": value})
    return losses


def _global_normalizers(micro_batches: Sequence[Batch], config: Config, structure: Structure) -> Normalizers:
    """Sums over all workers and micro-batches, known from the targets before the forward."""
    counts = [count_for_normalizers(micro.targets, config.model, structure) for micro in micro_batches]
    total = torch.stack(counts).sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
    return Normalizers(*total.clamp(min=1).float().unbind())


@dataclass(frozen=True)
class _Check:
    """What must be finite of a micro-batch."""

    image_ids: tuple[str, ...]
    loss: Tensor
    terms: dict[str, Tensor]
    matching_failure: str | None

    def failure(self) -> str | None:
        """What is not finite, if anything."""
        if self.matching_failure or torch.isfinite(self.loss):
            return self.matching_failure
        worst = [name for name, value in self.terms.items() if not torch.isfinite(value)]
        return f"losses of images {', '.join(self.image_ids)} not finite: {', '.join(worst)}"


def _stop_unless_finite(checks: Sequence[_Check], grad_norm: Tensor) -> None:
    """Stop all workers together if a cost, a loss or the gradient is not finite on any of them.

    The host waits for the device here and once per micro-batch in `match_heads`, nowhere else. A worker that
    stopped earlier would leave the others waiting for its gradients in their backward pass.
    """
    losses = torch.stack([check.loss for check in checks]).isfinite().all()
    here = losses & all(check.matching_failure is None for check in checks)
    everywhere = here.float()
    if dist.is_initialized():
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    fine, gradient_fine = to_host(torch.stack((everywhere.bool(), grad_norm.isfinite()))).tolist()
    if fine and gradient_fine:
        return
    failures = [failure for check in checks if (failure := check.failure())]
    if not fine:
        raise NonFiniteError(failures[0] if failures else "a value of another worker is not finite")
    images = ", ".join(image for check in checks for image in check.image_ids)
    raise NonFiniteError(f"backward: the gradient of images {images} is not finite")


def _structure(model: nn.Module, classes: int) -> Structure:
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(bare, Architecture) or bare.structure.classes != classes:
        raise ValueError(f"train_step: an Architecture for {classes} classes is expected")
    return bare.structure


@contextlib.contextmanager
def _gradients_stay_local(model: nn.Module, *, unless: bool) -> Iterator[None]:
    if isinstance(model, nn.parallel.DistributedDataParallel) and not unless:
        with model.no_sync():
            yield
    else:
        yield


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
