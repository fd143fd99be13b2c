"""The example noise and pixel decoder train a model; what does not fit is found before one is built."""

import numpy as np
import pytest
import torch

from mpformer.config import Config
from mpformer.model.architecture import build_model
from mpformer.model.noise import build_noise
from mpformer.train import plugins
from mpformer.types import InputError
from tests.model.samples import blobs, draws_of
from tests.train.conftest import make_batch
from tests.train.test_step import gradients_of_step, settings


def test_the_example_noise_and_pixel_decoder_take_part_in_a_step(folder):
    noise = {"kind": "erase_noise:EraseNoise", "options": {"ratio": 0.5}}
    config = settings(pixel_decoder={"kind": "sum_decoder:SumDecoder"}, pilot={"noise": noise})
    plugins.check(config)
    assert type(build_model(config.model, 3).pixel_decoder).__name__ == "SumDecoder"
    result, gradients = gradients_of_step(config, make_batch([3, 0]))
    assert torch.isfinite(result.losses["loss"])
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())


def test_the_example_noise_erases_its_share_of_the_cells(folder):
    noise = {"kind": "erase_noise:EraseNoise", "options": {"ratio": 0.5}}
    config = Config.model_validate({"model": {"pilot": {"noise": noise}}})
    (erase,) = build_noise(config.model.pilot).at_each_layer
    masks = blobs(4).masks
    rows = (np.zeros(4, int), np.arange(4), 1)
    erased = erase(masks, draws_of(1).rows("pilot noise", *rows))
    assert erased.dtype == torch.bool
    assert not (erased & ~masks).any()
    assert 0.4 < float(erased.sum() / masks.sum()) < 0.6
    assert torch.equal(erased, erase(masks, draws_of(1).rows("pilot noise", *rows)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"pilot": {"noise": {"kind": "erase_noise:EraseNoise", "options": {"ratio": 2}}}},
            r"model.pilot.noise: erase_noise:EraseNoise: ratio: 0 to 1 is expected, not 2",
        ),
        ({"pilot": {"noise": "sum_decoder:SumDecoder"}}, "model.pilot.noise: sum_decoder:SumDecoder: "),
        ({"pixel_decoder": {"kind": "sum_decoder:SumDecodr"}}, "nearest: sum_decoder:SumDecoder"),
        (
            {"pixel_decoder": {"kind": "sum_decoder:SumDecoder", "options": {"kernels": 3}}},
            "model.pixel_decoder.kind: sum_decoder:SumDecoder: .*'kernels'",
        ),
        (
            {"architecture": "sum_decoder:SumDecoder"},
            "is no subclass of mpformer.model.architecture.Architecture",
        ),
        (
            {"decoder": {"attention": "torch.nn:Identity"}},
            "torch.nn:Identity is no subclass of .*CrossAttention",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_on_the_driver(folder, model, message):
    with pytest.raises(InputError, match=message):
        plugins.check(Config.model_validate({"model": model}))
