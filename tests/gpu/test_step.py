"""A training step on a GPU: the host waits only where it says so, and the losses are those of a CPU."""

import pytest
import torch

from mpformer.model import matcher
from mpformer.model.architecture import build_model
from mpformer.train import step
from mpformer.train.optim import build_optimizer
from mpformer.train.timing import Timers
from tests.train.conftest import make_batch
from tests.train.test_step import CLASSES, PER_PIXEL, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SWITCHES = {
    "mp-former": {},
    "mask2former": {"pilot": {"queries": 0}},
    "released, all noise": {
        "pilot": {"flavour": "released", "noise": [{"kind": "shift"}, {"kind": "scale"}, {"kind": "point"}]}
    },
    "matched pilots": {"pilot": {"assignment": "match"}},
    "shared pilot points": {"loss": {"shared_pilot_points": True}},
    "padding ignored": {"loss": {"padding": "ignored"}},
    "layer consistency": {"loss": {"consistency_weight": 1.0}},
    "full masks": {"loss": {"points": None}},
    "boxes": {"loss": {"match_by": "boxes"}},
    "per pixel": PER_PIXEL,
}


@pytest.fixture
def no_waits():
    """Everything that makes the host wait is an error, but for an event."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_host_waits_only_where_it_says_so(switch, micro_batch, autocast, no_waits, monkeypatch):
    config = settings(**SWITCHES[switch])
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
    model = build_model(config.model, CLASSES).cuda().train()
    optimizer = build_optimizer(model, config.train)
    batch = make_batch([3, 0, 20, 2, 0, 0], classes=CLASSES).to("cuda")
    asked = []

    def to_host(values, really=matcher.to_host):
        asked.append(tuple(values.shape))
        return really(values)

    monkeypatch.setattr(matcher, "to_host", to_host)
    monkeypatch.setattr(step, "to_host", to_host)
    for repetition in range(2):  # the first one compiles kernels and makes the optimiser's state
        asked.clear()
        if repetition:
            no_waits()
        result = step.train_step(
            model, optimizer, batch, config, Timers(), classes=CLASSES, autocast=autocast
        )
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.total)
    matched = config.model.output == "masks"
    assert len(asked) == matched * (3 if micro_batch else 1) + 1


def test_the_mode_finds_a_wait(no_waits):
    values = torch.ones(3, device="cuda")
    no_waits()
    with pytest.raises(RuntimeError, match="synchronizing"):
        values.sum().item()


@pytest.mark.parametrize("switch", SWITCHES)
def test_losses_are_those_of_a_cpu(switch):
    """Both kinds of device draw the same random numbers: pilots, points and so the losses are the same."""
    config = settings(**SWITCHES[switch])
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = build_model(config.model, CLASSES).to(device).train()
        optimizer = build_optimizer(model, config.train)
        batch = make_batch([3, 0, 5]).to(device)
        result = step.train_step(model, optimizer, batch, config, Timers(), classes=CLASSES)
        losses.append({name: float(value) for name, value in result.losses.items()})
    # a point or a pair that is tied up to rounding may be another one
    assert losses[1] == pytest.approx(losses[0], rel=5e-3, abs=1e-3)
