"""Where the host waits for its device in a training step: nowhere but where it says so.

On the device "meta" tensors have shapes but no values, so that whoever wants to know one fails: what would
make the host wait for a GPU is an error here, on a machine without one. tests/gpu asks a GPU itself.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpformer.model import matcher
from mpformer.model.architecture import build_model
from mpformer.train import step
from mpformer.train.timing import Timers
from tests.train.conftest import make_batch
from tests.train.test_step import CLASSES, SWITCHES, Keep, one_object_per_class, settings

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class HiddenWaits(TorchDispatchMode):
    """Notes what makes the host wait though "meta" allows it: copies between devices, unless they are
    asked not to wait; indexing by masks, whose number of elements has to be known, or from another device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in COPIES:
            places = {a.device.type for a in args if isinstance(a, torch.Tensor)}
            places |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            if len(places) > 1 and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.found.append(f"{function} between {places}")
        if function in INDEXING and args[0].device.type == "meta":
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or index.device != args[0].device):
                    self.found.append(f"{function} with {index.dtype} on {index.device}")
        return function(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """Makes a step possible on "meta"; returns the sizes of what was asked for on the host."""
    asked = []

    def to_host(values):
        asked.append(tuple(values.shape))
        return torch.ones(values.shape, dtype=values.dtype)

    def made_on_the_host(make):
        def checked(*args, device=None, **kwargs):
            assert device is None, f"{make.__name__}(..., device=...) copies, and the host waits"
            return make(*args, **kwargs)

        return checked

    monkeypatch.setattr(matcher, "to_host", to_host)
    monkeypatch.setattr(step, "to_host", to_host)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no "meta"
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, made_on_the_host(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_tensor", None, raising=False)
    return asked


FAST = ("mp-former",)


@pytest.mark.parametrize(
    ("switch", "micro_batch"),
    [
        ("mp-former", 2),
        *(pytest.param(s, None, marks=() if s in FAST else pytest.mark.slow, id=s) for s in SWITCHES),
    ],
)
def test_the_host_waits_once_to_match_and_once_before_the_update(switch, micro_batch, on_meta):
    config = settings(**SWITCHES[switch])
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
    batch = make_batch([3, 0, 20, 2], classes=CLASSES)
    if config.data.task == "semantic":
        batch = one_object_per_class(batch)
    model, batch = build_model(config.model, CLASSES).train().to("meta"), batch.to("meta")
    with HiddenWaits() as waits:
        step.train_step(model, Keep(), batch, config, Timers(), classes=CLASSES)
    assert waits.found == []
    matched = config.model.output == "masks" and config.model.loss.assignment == "bipartite"
    assert len(on_meta) == matched * (2 if micro_batch else 1) + 1
    assert on_meta[-1] == (2,)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[0, 0]),
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(2, 2).to("meta"),
        lambda x: x.copy_(torch.ones(2, 2)),
        lambda x: torch.tensor([1.0], device="meta"),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.unique(),
    ],
)
def test_this_test_finds_waits(wait, on_meta):
    x = torch.empty(2, 2, device="meta")
    with HiddenWaits() as waits:
        try:
            wait(x)
        except (RuntimeError, AssertionError, TypeError):  # NotImplementedError is a RuntimeError
            return
    assert waits.found
