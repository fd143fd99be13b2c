"""What a model tells of itself: heads, attention layers, depth of its parameters; how far training is."""

import pytest
import torch

from mpformer.config.model import Model
from mpformer.model.architecture import build_model
from mpformer.model.segmenter import structure_of
from tests.model.samples import tiny_model

MASKFORMER = {"layers": 6, "features": "stride_32", "memory": "backbone", "query_features": "zero"}
PER_PIXEL = {"output": "per_pixel", "pilot": {"queries": 0}}


@pytest.mark.parametrize(
    ("settings", "heads", "strides", "queries"),
    [
        ({}, range(10), [(32,), (16,), (8,)] * 3, 100),
        ({"decoder": MASKFORMER}, range(1, 7), [(32,)] * 6, 100),
        ({"decoder": {"layers": 2, "features": "all_scales"}}, range(3), [(32, 16, 8)] * 2, 100),
        ({"decoder": {"layers": 0}}, [0], [], 100),
        ({**PER_PIXEL, "decoder": {"layers": 0, "query_features": "zero"}}, [0], [], 7),
        ({**PER_PIXEL, "decoder": MASKFORMER}, range(1, 7), [(32,)] * 6, 7),
        ({"loss": {"assignment": "fixed"}}, range(10), [(32,), (16,), (8,)] * 3, 7),
    ],
)
def test_heads_attention_and_queries_follow_from_the_settings(settings, heads, strides, queries):
    structure = structure_of(Model.model_validate(settings), 7)
    assert structure.head_layers == tuple(heads)
    assert structure.attention_strides == tuple(strides)
    assert structure.queries == queries
    assert structure.per_pixel == (settings.get("output") == "per_pixel")
    assert structure.head_prefixes == (*(f"head_{i}/" for i in list(heads)[:-1]), "")
    assert structure.layers_of(1) == (list(heads)[-1],)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet18", {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 4}),
        (
            "swin_tiny_patch4_window7_224",
            {
                "patch_embed.proj.bias": 0,
                "layers_1.blocks.0.mlp.fc1.bias": 3,
                "layers_3.blocks.1.norm1.bias": 12,
            },
        ),
        (
            "vit_tiny_patch16_224",
            {"model.pos_embed": 0, "model.blocks.0.norm1.bias": 1, "model.blocks.11.mlp.fc2.bias": 12},
        ),
    ],
)
def test_depth_counts_the_layers_of_the_backbone(backbone, expected):
    config = tiny_model()
    own = config.backbone.model_copy(update={"name": backbone})
    with torch.device("meta"):
        model = build_model(config.model_copy(update={"backbone": own}), 3)
    found = {entry.name: entry for entry in model.model_parameters()}
    assert len(found) == len(list(model.parameters()))
    assert {name: found[f"backbone.body.{name}"].depth for name in expected} == expected
    deepest = max(expected.values())
    assert found["decoder.query_feat.weight"].depth == deepest + 1
    assert {entry.in_backbone for entry in found.values() if entry.depth <= deepest} == {True}


def test_progress_is_told_and_no_part_of_the_weights():
    model = build_model(tiny_model(), 3)
    names = set(model.state_dict())
    assert model.progress == float(model.progress_tensor) == 1
    model.set_progress(0.25)
    assert model.progress == float(model.progress_tensor) == 0.25
    assert set(model.state_dict()) == names
    assert not any("progress" in name for name in names)
