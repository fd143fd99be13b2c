"""DETR's panoptic post-processing by hand."""

import torch

from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.postprocess_detr import detr_panoptic

SIZE = (8, 8)
SIZES = Sizes(SIZE, SIZE, SIZE)


def view(labels, scores, masks) -> View:
    """Queries of a class with a probability; masks [n,8,8] logits, no upsampling."""
    logits = torch.full((len(labels), 4), -20.0)
    for i, (label, score) in enumerate(zip(labels, scores)):
        logits[i, label] = torch.tensor(score).log()
        logits[i, 3] = torch.tensor(1 - score).log()
    return View(logits, masks, SIZES)


def halves(*columns: slice) -> torch.Tensor:
    masks = torch.full((len(columns), *SIZE), -5.0)
    for mask, part in zip(masks, columns):
        mask[:, part] = 5.0
    return masks


def found(*arguments, **settings):
    return detr_panoptic([view(*arguments)], thing_labels={0, 1}, **settings)


def test_every_pixel_goes_to_the_largest_mask():
    result = found(
        [0, 1], [0.95, 0.9], halves(slice(0, 5), slice(4, 8)) + torch.tensor([0.0, 1.0])[:, None, None]
    )
    assert result.labels == (0, 1)
    assert (result.ids[:, :4] == 1).all()
    assert (result.ids[:, 4:] == 2).all()  # the overlap, too, and nothing is void


def test_queries_below_the_confidence_and_no_object_are_dropped():
    masks = halves(slice(0, 3), slice(3, 6), slice(6, 8))
    result = found([0, 1, 3], [0.95, 0.8, 0.99], masks)
    assert result.labels == (0,)
    assert (result.ids == 1).all()
    assert found([0], [0.5], masks[:1]).labels == ()
    assert not found([0], [0.5], masks[:1]).ids.any()


def test_stuff_of_one_class_is_one_segment_and_things_are_not():
    masks = halves(slice(0, 3), slice(3, 6), slice(6, 8))
    stuff = found([2, 0, 2], [0.9, 0.95, 0.97], masks)
    assert sorted(stuff.labels) == [0, 2]
    ids = stuff.ids[0].tolist()
    assert ids[0] == ids[7] != ids[4]
    assert abs(stuff.scores[stuff.labels.index(2)] - 0.97) < 1e-4
    assert found([0, 0, 1], [0.9, 0.95, 0.97], masks).labels == (0, 0, 1)


def test_small_segments_are_removed_and_their_pixels_reassigned():
    masks = halves(slice(0, 4), slice(4, 8), slice(0, 0))
    masks[2, :2, :2] = 9.0  # four pixels
    result = found([0, 1, 1], [0.95] * 3, masks)
    assert result.labels == (0, 1)
    assert (result.ids[:, :4] == 1).all()
    masks[2, 2, 0] = 9.0  # five
    assert found([0, 1, 1], [0.95] * 3, masks).labels == (0, 1, 1)
