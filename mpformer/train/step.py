"""One training step, top to bottom in the order of the paper: read this first. No Ray, tracker, data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpformer.config import Config
from mpformer.config.model import Model as ModelConfig
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

    `model` is a `Segmenter`, bare or in DistributedDataParallel; `batch` lies on its device. The share is
    split into micro-batches of `train.micro_batch` images, whose gradients add up exactly to that of the
    global batch. Raises `NonFiniteError` on every worker, before the weights change, if a loss or the
    gradient is not finite on any of them.
    """
    seed, device = config.train.seed, batch.images.device
    micro_batches = batch.split(config.train.micro_batch or len(batch))
    normalizers = _global_normalizers(micro_batches, config, classes)
    checks: list[_Check] = []
    terms: dict[str, Tensor] = {}
    for micro in micro_batches:
        draws = SampleRandom(seed, "matching", micro.positions, device)
        pilot_draws = SampleRandom(seed, "pilots", micro.positions, device)
        with _gradients_stay_local(model, unless=micro is micro_batches[-1]):
            with timers("pilots"):
                pilots = make_pilots(micro.targets, config.model, classes, pilot_draws)
            with (
                timers("forward"),
                torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            ):
                output = model(micro.images, pilots)
            with timers("match"):
                matching = match_heads(output, pilots, micro, config.model, draws, pilot_draws)
            with timers("losses"):
                losses = _losses(output, pilots, matching, micro, normalizers, config.model, draws)
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
    pilots: Pilots | None,
    matching: Matching | None,
    batch: Batch,
    normalizers: Normalizers,
    config: ModelConfig,
    draws: SampleRandom,
) -> dict[str, Tensor]:
    """Weighted losses of all heads; those of the last head have no 'head_i/' before their name.

    Head i stands after layer i, head 0 before layer 1.
    """
    targets, valid_sizes, settings = batch.targets, batch.valid_sizes, config.loss
    layers = config.decoder.layers
    names = [f"head_{layer}/" for layer in range(layers + 1 - len(output.heads), layers)] + [""]
    losses: dict[str, Tensor] = {}
    if matching is None:
        for name, head in zip(names, output.heads):
            terms = per_pixel_losses(head, targets, normalizers, settings)
            losses.update({f"{name}loss_{kind}": value for kind, value in terms.items()})
        return losses
    for name, head, matches, drawn in zip(names, output.heads, matching.heads, matching.points):
        terms = matching_losses(head, targets, matches, normalizers, settings, drawn.losses, valid_sizes)
        losses.update({f"{name}loss_{kind}": value for kind, value in terms.items()})
    if pilots is not None and output.pilots is not None:
        piloted = zip(names, output.pilots, matching.pilots, matching.pilot_points)
        for name, head, objects, drawn in piloted:
            points = drawn.losses
            terms = pilot_losses(head, pilots, objects, targets, normalizers, settings, points, valid_sizes)
            losses.update({f"{name}pilot_loss_{kind}": value for kind, value in terms.items()})
    if settings.consistency_weight:
        size = (batch.images.shape[2], batch.images.shape[3])
        values = consistency_losses(output.heads, normalizers, settings, draws, valid_sizes, size)
        losses.update({f"{name}loss_consistency": value for name, value in zip(names[1:], values)})
    return losses


def _global_normalizers(micro_batches: Sequence[Batch], config: Config, classes: int) -> Normalizers:
    """Sums over all workers and micro-batches, known from the targets before the forward."""
    counts = [count_for_normalizers(micro.targets, config.model, classes) for micro in micro_batches]
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
        raise NonFiniteError(failures[0] if failures else "another worker met a number that is not finite")
    images = ", ".join(image for check in checks for image in check.image_ids)
    raise NonFiniteError(f"backward: the gradient of images {images} is not finite")


@contextlib.contextmanager
def _gradients_stay_local(model: nn.Module, *, unless: bool) -> Iterator[None]:
    if isinstance(model, nn.parallel.DistributedDataParallel) and not unless:
        with model.no_sync():
            yield
    else:
        yield


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
