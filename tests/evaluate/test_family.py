"""Evaluation and diagnostics of every kind of model, with clear errors for what a model does not have."""

import math

import pytest
import torch

from mpformer.config import Config
from mpformer.evaluate.diagnostics import diagnose
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.metrics import evaluate_predictions
from mpformer.types import InputError
from tests.evaluate.scenes import scenes, tiny_config, tiny_model

pytestmark = pytest.mark.slow

MASKFORMER = {
    "pixel_decoder": {"kind": "fpn"},
    "decoder": {
        "attention": "cross",
        "features": "stride_32",
        "memory": "backbone",
        "query_features": "zero",
        "order": "self_first",
    },
}
MODELS = {
    "smca": {"decoder": {"attention": "smca"}},
    "mask pooling": {"decoder": {"attention": "mask_pooling"}},
    "all scales": {"decoder": {"features": "all_scales"}},
    "maskformer": MASKFORMER,
    "boxes": {"loss": {"match_by": "boxes"}},
    "points or masks": {"loss": {"match_points": 16}},
}
PER_PIXEL = {"output": "per_pixel", "pilot": {"queries": 0}}


def laid_over(config: Config, sections: dict, **rest) -> Config:
    """The config with sections of its model changed."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree["model"][name] = {**tree["model"][name], **values} if isinstance(values, dict) else values
    for section, values in rest.items():
        tree[section] = {**tree[section], **values}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def catalog():
    return scenes(3, seed=3)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_has_diagnostics(kind, catalog):
    config = laid_over(tiny_config(), MODELS[kind])
    torch.manual_seed(0)
    found = diagnose(tiny_model(config).eval(), catalog, config).layers
    layers = [1, 2, 3] if kind != "maskformer" else [2, 3]  # there is no head before layer 1
    assert list(found["layer_iou"]) == layers
    assert list(found["attention_inside"]) == [1, 2, 3]
    assert all(0 <= v <= 100 for values in found.values() for v in values.values())


@pytest.mark.parametrize("decoder", [{"layers": 0}, MASKFORMER["decoder"]], ids=["baseline", "baseline+"])
def test_per_pixel_models_are_evaluated_on_semantic_tasks(decoder, catalog):
    sections = {**PER_PIXEL, "pixel_decoder": {"kind": "fpn"}, "decoder": decoder}
    config = laid_over(tiny_config("semantic"), sections)
    model = tiny_model(config).eval()
    figures = evaluate_predictions(predict_records(model, catalog, config), catalog, "semantic")
    assert math.isfinite(figures["mIoU"])
    with pytest.raises(InputError, match="per-pixel model has no object queries"):
        diagnose(model, catalog, config)


def test_panoptic_results_with_detrs_post_processing(catalog):
    config = laid_over(
        tiny_config(), {"pilot": {"queries": 0}}, evaluate={"panoptic": "detr", "class_confidence": 0.0}
    )
    torch.manual_seed(0)
    model = tiny_model(config).eval()
    with torch.no_grad():
        model.decoder.class_embed.bias[-1] = -9.0  # every query is sure of an object
    figures = evaluate_predictions(predict_records(model, catalog, config), catalog, "panoptic")
    assert math.isfinite(figures["PQ"])
