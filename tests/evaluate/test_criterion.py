"""The validation loss is the training step's loss of the same images, and depends on nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from mpformer.config import Config
from mpformer.data.images import load_image
from mpformer.evaluate.criterion import mean_loss
from mpformer.evaluate.evaluation import evaluate
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.truth import target_of
from mpformer.evaluate.views import prepare
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from mpformer.types import Batch
from tests.evaluate.scenes import scenes, tiny_config, tiny_model

KINDS = {
    "full masks": ("panoptic", {"loss": {"points": None}}),
    "no padding, consistency": (
        "instance",
        {"loss": {"points": None, "padding": "ignored", "consistency_weight": 1.0}},
    ),
    "focal": ("panoptic", {"loss": {"points": None, "mask_loss": "focal", "no_object_weight": 0.3}}),
    "per pixel": ("semantic", {"output": "per_pixel", "pilot": {"queries": 0}}),
    "per pixel, masks": (
        "semantic",
        {"output": "per_pixel", "pilot": {"queries": 0}, "loss": {"per_pixel": "focal_dice"}},
    ),
}


def configured(task: str, model: dict) -> Config:
    config = tiny_config(task)
    tree = config.model_dump()
    for key, value in model.items():
        tree["model"][key] = {**tree["model"][key], **value} if isinstance(value, dict) else value
    tree["model"]["backbone"]["name"] = "test_resnet"
    tree["data"]["test_resize"] = {"short": 60, "long": 96}
    tree["evaluate"] |= {"loss": True, "layers": False}
    return Config.model_validate(tree)


def as_trained(model, catalog, config) -> dict[str, float]:
    """The losses that a training step computes of all images as one global batch."""
    images, targets, sizes = [], [], []
    for record in catalog.records:
        tensor, size = prepare(load_image(record), config.data.test_resize)
        images.append(tensor)
        targets.append(target_of(record, size, config.data.task))
        sizes.append(size.valid)
    ids = tuple(record.image_id for record in catalog.records)
    batch = Batch(torch.cat(images), tuple(targets), tuple(sizes), ids, tuple(range(len(ids))))
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    result = train_step(model, frozen, batch, config, Timers(), classes=len(catalog.classes))
    return {name: float(value) for name, value in result.losses.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_a_training_step_on_all_images_at_once(kind):
    config = configured(*KINDS[kind])
    catalog = scenes(4, size=(72, 100))
    # one size, so that all of them fit into one batch
    same = [r for r in scenes(24).records if (r.height, r.width) == (72, 100)][:4]
    catalog = replace(catalog, records=same)
    assert len({len(r.segments) for r in same}) > 1
    model = tiny_model(config)
    found, _ = evaluate(model, catalog, config)
    expected = as_trained(model.train(), catalog, config)
    named = {name for name in expected if name.startswith("loss")}
    assert found.losses.keys() == named
    assert len(named) > 1
    assert found.losses == pytest.approx({name: expected[name] for name in named}, rel=2e-5)
    assert {f"val/{name}" for name in named} <= found.values().keys()


def test_with_random_points_it_is_the_same_at_every_call_and_in_any_order_and_leaves_torch_s_numbers():
    config = configured("panoptic", {"loss": {"points": 256}})
    catalog = scenes(5)
    model = tiny_model(config)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    predictions = list(predict_records(model, catalog, config))
    assert torch.equal(torch.get_rng_state(), state)
    losses = mean_loss(predictions)
    other_seed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 8})})
    again = [p for i in (3, 0, 4, 1, 2) for p in predict_records(model, catalog, other_seed, [i])]
    random.Random(0).shuffle(again)
    assert mean_loss(again) == losses
    exact = configured("panoptic", {"loss": {"points": None}})
    assert losses["loss"] == pytest.approx(mean_loss(predict_records(model, catalog, exact))["loss"], rel=0.1)


def test_what_was_predicted_is_as_without_it():
    config, catalog = configured("panoptic", {}), scenes(2)
    model = tiny_model(config)
    for layers in (True, False):
        options = config.evaluate.model_copy(update={"layers": layers})
        with_loss = config.model_copy(update={"evaluate": options})
        without = with_loss.model_copy(update={"evaluate": options.model_copy(update={"loss": False})})
        plain = list(predict_records(model, catalog, without))
        assert [replace(p, loss=None) for p in predict_records(model, catalog, with_loss)] == plain
        assert mean_loss(plain) == {}
        assert (plain[0].layers is not None) == layers


def test_weights_that_are_not_finite_have_a_loss_that_is_not():
    config, catalog = configured("panoptic", {"loss": {"points": 64}}), scenes(1)
    model = tiny_model(config)
    torch.nn.init.constant_(model.decoder.class_embed.bias, float("nan"))
    losses = mean_loss(predict_records(model, catalog, config))
    assert all(value != value for value in losses.values()), losses
