"""An attention and an architecture from outside: the examples train; what does not fit is an error."""

import pytest
import torch
from torch.nn import functional as F

from mpformer.model.architecture import build_model, check_plugins
from mpformer.model.counting import count_size
from mpformer.train.execution import prepare
from mpformer.train.optim import build_optimizer
from mpformer.types import InputError
from tests.model.samples import blobs, pilots_for
from tests.train.conftest import make_batch
from tests.train.test_step import CLASSES, gradients_of_step, settings

ATTENTION = {"kind": "cosine_attention:CosineAttention", "options": {"temperature": 0.3}}
ARCHITECTURE = {"kind": "patch_segmenter:PatchSegmenter", "options": {"channels": 16, "layers": 3}}


def test_an_attention_takes_part_in_a_step_within_the_predicted_masks(folder):
    config = settings(decoder={"attention": ATTENTION})
    model = build_model(config.model, CLASSES)
    result, gradients = gradients_of_step(config, make_batch([3, 0]), model=model)
    assert torch.isfinite(result.total)
    assert [n for n, g in gradients.items() if g is None or not torch.isfinite(g).all()] == []
    with torch.no_grad(), model.recorded_attention() as weights:
        head, *_ = model.eval()(make_batch([1]).images, all_heads=True).heads
    foreground = F.interpolate(head.mask_logits, size=(2, 2), mode="bilinear").flatten(2) >= 0
    some = foreground.any(2)
    assert len(weights) == 4
    assert (weights[0].sum(2) - 1).abs().max() < 1e-5
    assert not weights[0][some][~foreground[some]].any()


@pytest.mark.parametrize("pilots", [0, 12])
def test_an_architecture_trains_is_counted_and_takes_pilots_at_its_own_stride(folder, pilots):
    config = settings(architecture=ARCHITECTURE, pilot={"queries": pilots, "layers": [1, 3]})
    model = build_model(config.model, CLASSES)
    prepare(model, config.train.model_copy(update={"activation_checkpointing": True}))
    result, gradients = gradients_of_step(config, make_batch([3, 1]), model=model)
    assert [n for n, g in gradients.items() if g is None or not torch.isfinite(g).all()] == []
    expected = {f"{head}loss_{term}" for head in ("head_1/", "head_2/", "") for term in ("class", "mask")}
    assert expected <= set(result.losses)
    assert ("head_2/pilot_loss_mask" in result.losses) == (pilots > 0)
    rates = {group["base_lr"] for group in build_optimizer(model, config.train).param_groups}
    assert len(rates) == 2  # the backbone's and the others'
    assert count_size(config.model, CLASSES, 64, 64).parameters == sum(p.numel() for p in model.parameters())
    if pilots:
        made = pilots_for([blobs(2)], config.model, structure=model.structure)
        first, second, third = made.attention_masks
        assert second is None
        assert first.shape == third.shape == (1, 12, 4 * 6)


OWN = """
import torch
from torch import nn
from mpformer.model.architecture import Architecture
from mpformer.model.attention import CrossAttention

class NoModule:
    def __init__(self, channels, backbone_channels):
        pass
    def forward(self, features):
        return features

class NoForward(CrossAttention):
    def weights(self, query, key, mask=None, centers=None):
        return query

class NoSubclass(nn.Module):
    def __init__(self, channels, heads, dropout):
        super().__init__()
    def forward(self, query, key, value, mask=None, centers=None):
        return query
    def weights(self, query, key, mask=None, centers=None):
        return query

class NoStructure(Architecture):
    def forward(self, images, pilots=None, all_heads=False):
        return images

def halved(masks, draws):
    return masks.float() / 2
"""


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"pixel_decoder": {"kind": "own:NoModule"}},
            "kind: own:NoModule: a torch.nn.Module",
        ),
        ({"pixel_decoder": {"kind": "own:Lost"}}, "model.pixel_decoder.*has no 'Lost'"),
        (
            {"decoder": {"attention": "own:NoForward"}},
            "model.decoder.attention: .*lacks the method.* forward",
        ),
        ({"decoder": {"attention": "own:NoSubclass"}}, "own:NoSubclass is no subclass of .*CrossAttention"),
        ({"decoder": {"attention": {**ATTENTION, "options": {"temperature": 0}}}}, "a positive number"),
        ({"architecture": "own:NoStructure"}, "own:NoStructure does not set `structure`"),
        ({"architecture": ARCHITECTURE, "pilot": {"layers": [4]}}, "model.pilot.layers: .* layers 1 to 3"),
    ],
)
def test_what_does_not_fit_is_one_error_before_training(folder, sections, message):
    (folder / "own.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        check_plugins(settings(**sections).model)


def test_a_noise_that_returns_something_else_is_named(folder):
    (folder / "own.py").write_text(OWN)
    config = settings(pilot={"noise": "own:halved"})
    with pytest.raises(InputError, match=r"masks torch.bool .* expected, not torch.float32"):
        pilots_for([blobs(2)], config.model)
