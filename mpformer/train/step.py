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
    pilot_losses,
)
from mpformer.model.matcher import NonFiniteError
from mpformer.model.matching import Matching, match_heads
from mpformer.model.objects import Objects, objects_of
from mpformer.model.per_pixel import per_pixel_losses
from mpformer.model.piloting import make_pilots, plan_pilots
from mpformer.model.streams import SampleRandom
from mpformer.model.transfer import to_host
from mpformer.train.timing import Timers
from mpformer.types import Batch, Output, Pilots


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
    totals: dict[str, Tensor] = {}
    for micro in micro_batches:
        objects, draws = objects_of(micro), SampleRandom(seed, micro.positions, device)
        with _gradients_stay_local(model, unless=micro is micro_batches[-1]):
            with timers("pilots"):
                plan = plan_pilots(objects, config.model.pilot, draws)
                pilots = None
                if plan is not None:
                    pilots = make_pilots(plan, objects, config.model.pilot, structure, draws)
            with (
                timers("forward"),
                torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            ):
                output = model(micro.images, pilots)
            with timers("match"):
                matching = match_heads(output, plan, objects, micro.image_ids, config.model, draws)
            with timers("losses"):
                losses = _losses(output, matching, pilots, objects, normalizers, config.model.loss, draws)
                loss = torch.cat(list(losses.values())).sum()
            with timers("backward"):
                # DistributedDataParallel averages over workers; the losses are shares of one sum
                (loss * _world_size()).backward()
        detached = {name: values.detach() for name, values in losses.items()}
        failure = matching.failure if matching else None
        checks.append(_Check(micro.image_ids, loss.detach(), detached, failure))
        totals = {name: totals[name] + values for name, values in detached.items()} if totals else detached
    with timers("optimizer"):
        limit = config.train.clip_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        _stop_unless_finite(checks, grad_norm, structure)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    total = torch.stack([check.loss for check in checks]).sum()
    return StepResult({**_sums(totals), **_named(totals, structure.head_prefixes)}, total, grad_norm)


def _sums(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of the matching part and, with pilots, of the mask-piloted part."""
    pilots = [values for name, values in losses.items() if name.startswith("pilot_loss_")]
    matching = [values for name, values in losses.items() if not name.startswith("pilot_loss_")]
    sums = {"loss": torch.cat(matching).sum()}
    return sums | {"pilot_loss": torch.cat(pilots).sum()} if pilots else sums


def _losses(
    output: Output,
    matching: Matching | None,
    pilots: Pilots | None,
    objects: Objects,
    normalizers: Normalizers,
    config: LossConfig,
    draws: SampleRandom,
) -> dict[str, Tensor]:
    """Weighted losses of the heads by name, such as 'loss_mask' and 'pilot_loss_mask', each [L].

    'loss_consistency' has no value for the first head: [L-1].
    """
    if matching is None:
        pixels, queries = normalizers.pixels, normalizers.queries
        return _prefixed("loss_", per_pixel_losses(output.heads, objects, pixels, queries, config))
    losses = _prefixed("loss_", matching_losses(output.heads, objects, matching.pairs, normalizers, config))
    if pilots is not None and matching.piloted is not None and output.pilots:
        terms = pilot_losses(output.pilots, pilots, objects, matching.piloted, normalizers, config)
        losses |= _prefixed("pilot_loss_", terms)
    if config.consistency_weight and len(output.heads) > 1:
        losses["loss_consistency"] = consistency_losses(output.heads, objects, normalizers, config, draws)
    return losses


def _prefixed(prefix: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": values for name, values in terms.items()}


def _named(losses: dict[str, Tensor], head_prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Scalars by name and head; those of the last head have no 'head_3/' before their name."""
    return {
        f"{prefix}{name}": value
        for name, values in losses.items()
        for prefix, value in zip(head_prefixes[-len(values) :], values.unbind())
    }


def _global_normalizers(micro_batches: Sequence[Batch], config: Config, structure: Structure) -> Normalizers:
    """Sums over all workers and micro-batches, known from the targets before the forward."""
    counts = [count_for_normalizers(micro, config.model, structure) for micro in micro_batches]
    total = torch.stack(counts).sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
    return Normalizers(*total.clamp(min=1).float().unbind())


@dataclass(frozen=True)
class _Check:
    """What must be finite of a micro-batch."""

    image_ids: tuple[str, ...]
    loss: Tensor
    losses: dict[str, Tensor]
    matching_failure: str | None

    def failure(self, structure: Structure) -> str | None:
        """What is not finite, if anything."""
        if self.matching_failure or torch.isfinite(self.loss):
            return self.matching_failure
        terms = _named(self.losses, structure.head_prefixes)
        worst = [name for name, value in terms.items() if not torch.isfinite(value)]
        return f"losses of images {', '.join(self.image_ids)} not finite: {', '.join(worst)}"


def _stop_unless_finite(checks: Sequence[_Check], grad_norm: Tensor, structure: Structure) -> None:
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
    failures = [failure for check in checks if (failure := check.failure(structure))]
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
