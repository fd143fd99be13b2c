"""The validation loss: the training criterion on the images of an evaluation (`evaluate.loss`).

It is the loss of the matching part, as `train/loss`, of the images as they are evaluated: resized for the
test, not augmented, in evaluation mode. Each term is normalised over all images of the evaluation, as if they
were one global batch. The random points of an image follow from its id alone, and sums are exact, so
the figures depend neither on the number of workers nor on the seed of the run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import torch

from mpformer.evaluate.postprocess import Sizes
from mpformer.evaluate.prediction import ImageLoss, Prediction
from mpformer.model.architecture import Architecture
from mpformer.model.losses import Normalizers, consistency_losses, count_for_normalizers, matching_losses
from mpformer.model.matching import match_heads
from mpformer.model.objects import objects_of
from mpformer.model.per_pixel import per_pixel_losses
from mpformer.model.streams import SampleRandom
from mpformer.types import Batch, Head, Output, Target

_ONE = Normalizers(*[1.0] * 6)
_OBJECTS, _CLASS_WEIGHT, _QUERIES, _PIXELS = 0, 1, 4, 5
"""Places in `Normalizers`."""
_NORMALIZER = {"class": _CLASS_WEIGHT, "consistency": _QUERIES, "pixel": _PIXELS}
"""What a term is divided by, where that is not the number of objects."""


def image_loss(
    heads: Sequence[Head], target: Target, sizes: Sizes, image_id: str, model: Architecture
) -> ImageLoss:
    """What one image adds to the validation loss.

    heads: all of the model for a batch of this image; target: at the size of the network input. Where a cost
    is not finite the sums are not, either.
    """
    config, random = model.config, zlib.crc32(image_id.encode(errors="surrogateescape"))
    no_images = torch.empty((1, 3, 0, 0), device=target.masks.device)  # the losses do not look at them
    batch = Batch(no_images, (target,), (sizes.valid,), (image_id,), (random,))
    objects, draws = objects_of(batch), SampleRandom(0, batch.positions, target.masks.device)
    shares = count_for_normalizers(batch, config, model.structure).tolist()
    matching = match_heads(Output(tuple(heads)), None, objects, batch.image_ids, config, draws)
    if matching is None:
        terms = per_pixel_losses(heads, objects, 1.0, 1.0, config.loss)
        places = {name: _NORMALIZER.get(name, _QUERIES) for name in terms}
    else:
        terms = matching_losses(heads, objects, matching.pairs, _ONE, config.loss)
        if config.loss.consistency_weight and len(heads) > 1:
            terms["consistency"] = consistency_losses(heads, objects, _ONE, config.loss, draws)
        places = {name: _NORMALIZER.get(name, _OBJECTS) for name in terms}
    failed = matching is not None and matching.failure is not None
    sums = {name: tuple(math.nan if failed else v for v in each.tolist()) for name, each in terms.items()}
    return ImageLoss(sums, {name: shares[place] for name, place in places.items()})


def mean_loss(predictions: Iterable[Prediction]) -> dict[str, float]:
    """{"loss": of all heads, "loss_class": of the last head, "loss_mask": ..., ...}; empty without losses."""
    found = [prediction.loss for prediction in predictions if prediction.loss is not None]
    if not found:
        return {}
    terms: dict[str, list[float]] = {}
    for name in found[0].sums:
        share = max(1.0, math.fsum(one.shares[name] for one in found))
        terms[name] = [math.fsum(of_head) / share for of_head in zip(*(one.sums[name] for one in found))]
    total = math.fsum(value for values in terms.values() for value in values)
    return {"loss": total, **{f"loss_{name}": values[-1] for name, values in terms.items()}}
