"""Random weights at the start: what two models share, they share bit by bit."""

import torch

from mpformer.model.architecture import build_model
from tests.model.samples import tiny_model


def start(pilot_queries: int):
    torch.manual_seed(5)
    return build_model(tiny_model({"queries": pilot_queries}), 3).state_dict()


def test_pilots_do_not_change_the_other_weights_of_a_seed():
    plain, piloted = start(0), start(100)
    assert set(piloted) - set(plain) == {"decoder.pilot_embed.weight"}
    assert [name for name in plain if not torch.equal(plain[name], piloted[name])] == []
