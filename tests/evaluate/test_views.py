"""Test-time augmentation: the choice of views, and the alignment of their queries."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpformer.config import TestResize as Resize
from mpformer.evaluate.inference import infer, predict_records
from mpformer.evaluate.metrics import evaluate_predictions
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.views import align_queries, predict_views, prepare
from tests.evaluate.scenes import ColourModel, scenes, tiny_config

CPU = torch.device("cpu")


def options(**changes):
    return tiny_config().evaluate.model_copy(update=changes)


def test_the_input_is_resized_and_padded_with_the_pixel_mean():
    image = np.full((50, 90, 3), 200, np.uint8)
    tensor, sizes = prepare(image, Resize(short=70, long=200))
    assert (sizes.padded, sizes.valid, sizes.original) == ((96, 128), (70, 126), (50, 90))
    assert tensor.shape == (1, 3, 96, 128)
    assert (tensor[0, :, :70, :126] == 200).all()
    assert tensor[0, :, 80, 50].tolist() == tensor[0, :, 5, 127].tolist() == [124, 116, 104]
    assert prepare(image, Resize(short=70, long=200), 0.5)[1].valid == (35, 63)
    assert prepare(image, Resize(short=None, long=None), 1.5)[1].valid == (75, 135)


@pytest.mark.parametrize("scales", [(0.5, 1.0, 1.5), (1.5, 1.0, 0.5), (0.5, 0.9)])
def test_the_reference_comes_first_and_every_scale_once_each_way(scales):
    image = np.zeros((60, 80, 3), np.uint8)
    predicted = predict_views(
        ColourModel(), [image], Resize(short=60, long=80), options(scales=scales, flip=True), CPU
    )
    [(views, _)] = predicted
    nearest = 0.9 if 0.9 in scales else 1.0
    assert (views[0].sizes.valid, views[0].flipped) == ((round(60 * nearest), round(80 * nearest)), False)
    seen = sorted((v.sizes.valid[0] / 60, v.flipped) for v in views)
    assert seen == sorted((s, m) for s in scales for m in (False, True))


def test_queries_of_another_view_are_aligned():
    """A view with shuffled queries, of another size and flipped, gets the reference's order."""
    g = torch.Generator().manual_seed(0)
    small = torch.randn(1, 8, 5, 6, generator=g) * 6
    classes = torch.randn(8, 4, generator=g) * 4
    shuffled = torch.randperm(8, generator=g)

    def resized(height, width):
        return torch.nn.functional.interpolate(small, (height, width), mode="bicubic")[0]

    reference = View(classes, resized(16, 24), Sizes((64, 96), (64, 96), (64, 96)))
    other = View(
        classes[shuffled] + 0.1,
        resized(32, 48)[shuffled].flip(2),
        Sizes((128, 192), (128, 192), (64, 96)),
        flipped=True,
    )
    result = align_queries([reference, other])
    torch.testing.assert_close(result[1].class_logits, classes + 0.1)
    torch.testing.assert_close(result[1].mask_logits.flip(2), resized(32, 48))


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_views_of_a_model_that_sees_the_same_in_all_of_them_change_little(task):
    """The colour model finds the same things at every size; only borders may differ."""
    catalog = scenes(4, seed=1)
    config = tiny_config(task)
    many = config.model_copy(update={"evaluate": options(scales=(0.75, 1.0, 1.5), flip=True)})
    alone = evaluate_predictions(predict_records(ColourModel(), catalog, config), catalog, task)
    together = evaluate_predictions(predict_records(ColourModel(), catalog, many), catalog, task)
    for name in ("mIoU", "PQ_stuff"):
        assert together[name] == pytest.approx(alone[name], abs=8)
        assert together[name] != alone[name]
    if task == "panoptic":
        assert together["AP"] == alone["AP"]  # instances come from the reference alone


def test_general_inference_is_void_where_no_query_is_confident():
    catalog = scenes(2, seed=1)
    config = tiny_config("semantic")
    record = catalog.records[0]

    def labels(**changes):
        changed = config.model_copy(update={"evaluate": options(semantic="general", **changes)})
        return evaluate_predictions(predict_records(ColourModel(), [record], changed), catalog, "semantic")

    assert labels(general_confidence=0.3)["pixel_accuracy"] > 60
    names = ("mIoU", "pixel_accuracy", "class_accuracy", "PQ_stuff", "SQ_stuff", "RQ_stuff")
    assert labels(general_confidence=1.0) == dict.fromkeys(names, 0.0)
    [found] = infer(
        ColourModel(),
        [np.zeros((40, 40, 3), np.uint8)],
        "semantic",
        config.data.test_resize,
        options(semantic="general", general_confidence=1.0),
        CPU,
    )
    assert (found.semantic == -1).all()
    assert replace(found, semantic=None).compact("x").semantic is None
