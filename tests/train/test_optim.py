"""Parameter groups and schedules of the papers' recipes."""

import contextlib
import math
from collections import Counter

import pytest
import torch
from torch.utils._foreach_utils import _device_has_foreach_support
from torch.utils._python_dispatch import TorchDispatchMode

from mpformer.config import Config, Plugin, PolySchedule, StepSchedule, Train
from mpformer.model.architecture import build_model
from mpformer.train.optim import build_optimizer, check_plugins, rate_factor, set_rates
from mpformer.train.step import train_step
from mpformer.types import InputError
from tests.train.conftest import make_batch


@pytest.fixture(scope="module")
def model():
    config = Config.model_validate(
        {
            "model": {
                "backbone": {"name": "swin_tiny_patch4_window7_224", "pretrained": None},
                "pixel_decoder": {"channels": 32, "layers": 1},
                "decoder": {"layers": 1},
            }
        }
    )
    return build_model(config.model, 3)


def group_of(optimizer, parameter):
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


def test_groups_are_the_papers(model):
    optimizer = build_optimizer(model, Train(lr=1e-4, weight_decay=0.05, backbone_lr_factor=0.1))
    body, decoder = model.backbone.body, model.decoder
    expected = {
        # (parameter): (rate, decay)
        body.patch_embed.proj.weight: (1e-5, 0.05),
        body.layers_0.blocks[0].attn.qkv.bias: (1e-5, 0.05),
        body.layers_0.blocks[0].norm1.weight: (1e-5, 0.0),
        body.layers_0.blocks[0].attn.relative_position_bias_table: (1e-5, 0.0),
        model.backbone.norms[0].bias: (1e-5, 0.0),
        decoder.layers[0].linear1.weight: (1e-4, 0.05),
        decoder.layers[0].linear1.bias: (1e-4, 0.05),
        decoder.layers[0].self_attn.in_proj_weight: (1e-4, 0.05),
        decoder.query_feat.weight: (1e-4, 0.0),
        decoder.query_embed.weight: (1e-4, 0.0),
        decoder.pilot_embed.weight: (1e-4, 0.0),
        decoder.level_embed.weight: (1e-4, 0.0),
        decoder.norm.weight: (1e-4, 0.0),
        model.pixel_decoder.input_proj[0][1].weight: (1e-4, 0.0),  # GroupNorm
        model.pixel_decoder.mask_features.weight: (1e-4, 0.05),
    }
    for parameter, (rate, decay) in expected.items():
        group = group_of(optimizer, parameter)
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate), decay)
    counted = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(counted) == len(set(map(id, counted))) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(model):
    model.decoder.query_feat.weight.requires_grad_(False)
    try:
        optimizer = build_optimizer(model, Train())
        assert all(
            p is not model.decoder.query_feat.weight for g in optimizer.param_groups for p in g["params"]
        )
    finally:
        model.decoder.query_feat.weight.requires_grad_(True)


def test_step_schedule_drops_twice():
    train = Train(schedule=StepSchedule(at=(0.9, 0.95), factor=0.1))
    factors = {step: rate_factor(step, 1000, train) for step in (0, 899, 900, 949, 950, 999)}
    assert factors == pytest.approx({0: 1, 899: 1, 900: 0.1, 949: 0.1, 950: 0.01, 999: 0.01})


def test_poly_schedule():
    train = Train(schedule=PolySchedule(power=0.9))
    assert [rate_factor(s, 100, train) for s in (0, 50, 99)] == pytest.approx([1, 0.5**0.9, 0.01**0.9])


def test_warmup_rises_linearly():
    train = Train(warmup=0.1, schedule=StepSchedule(at=()))
    assert [rate_factor(s, 100, train) for s in (0, 4, 9, 10, 50)] == pytest.approx([0.1, 0.5, 1, 1, 1])


def test_rates_follow_each_group_s_own():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": [w], "lr": lr, "base_lr": lr} for w, lr in zip(weights, (1e-4, 1e-5))]
    )
    set_rates(optimizer, 0.1)
    set_rates(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-5, 5e-6])


def test_any_optimizer_of_torch_gets_the_groups(model):
    train = Train(optimizer=Plugin(kind="torch.optim:SGD", options={"momentum": 0.9}), lr=0.5)
    optimizer, default = build_optimizer(model, train), build_optimizer(model, Train(lr=0.5))
    assert type(optimizer) is torch.optim.SGD
    for group, expected in zip(optimizer.param_groups, default.param_groups, strict=True):
        assert all(group[key] == expected[key] for key in ("lr", "base_lr", "weight_decay"))
        assert list(map(id, group["params"])) == list(map(id, expected["params"]))
        assert group["momentum"] == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "torch.optim:SDG"},
            "train.optimizer: module 'torch.optim' has no 'SDG'; nearest: .*:SGD",
        ),
        ({"optimizer": "torch.optim:LBFGS"}, r"torch.optim:LBFGS: step\(\) of OptimizerStep: .*closure"),
        ({"optimizer": "torch.optim:SparseAdam"}, "torch.optim:SparseAdam: a step fails: RuntimeError"),
        ({"optimizer": "torch.nn:ModuleList"}, "torch.nn:ModuleList lacks the method step"),
        ({"optimizer": "tests.plugins.optimizers:Half"}, "is no torch.optim.Optimizer"),
        (
            {"optimizer": {"kind": "torch.optim:SGD", "options": {"momentum": -1}}},
            "train.optimizer: torch.optim:SGD: Invalid momentum",
        ),
        (
            {"optimizer": {"kind": "torch.optim:SGD", "options": {"momentun": 0.9}}},
            "unexpected keyword argument 'momentun'",
        ),
        ({"schedule": {"kind": "math:pi"}}, "train.schedule: math:pi is no class or function"),
    ],
)
def test_a_plug_in_that_does_not_fit_is_one_error_before_anything_starts(settings, message):
    with pytest.raises(InputError, match=message):
        check_plugins(Train.model_validate(settings))


def test_a_schedule_of_one_s_own_is_multiplied_by_the_warm_up():
    train = Train.model_validate({"schedule": {"kind": "math:cos"}, "warmup": 0.5})
    assert [rate_factor(s, 8, train) for s in (1, 4, 6)] == pytest.approx(
        [0.5 * math.cos(1 / 8), math.cos(1 / 2), math.cos(3 / 4)]
    )


class Calls(TorchDispatchMode):
    """Counts operator calls by phase and name: a mode to put around a step, and the timers to give to it."""

    def __init__(self):
        super().__init__()
        self.phase, self.counted = None, {}

    def __call__(self, phase):
        self.phase, self.counted[phase] = phase, Counter()
        return contextlib.nullcontext()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and self.phase:
            self.counted[self.phase][function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_clipping_and_update_are_calls_by_group_not_by_parameter(tiny_config):
    """One norm of all gradients, one scaling, one fused update for each group: on a GPU each is a launch."""
    model = build_model(tiny_config.model, 3).train()
    optimizer = build_optimizer(model, tiny_config.train)
    groups, parameters = len(optimizer.param_groups), len(list(model.parameters()))
    for _ in range(2):  # the first step makes the optimiser's state, parameter by parameter
        with Calls() as calls:
            train_step(model, optimizer, make_batch([3, 1]), tiny_config, calls, classes=3)
    found = calls.counted["optimizer"]
    assert found["_fused_adamw_"] == groups
    assert found["_foreach_norm"] == found["_foreach_mul_"] == 1
    # with the test of losses and gradient and the sums of the losses, which follow in the same phase
    assert max(found.values()) < 10 < found.total() < parameters / 2
    # the counted forms are those of a GPU: what is fused is asked for, `foreach` follows from the device
    assert all(group["fused"] for group in optimizer.param_groups)
    assert _device_has_foreach_support(torch.device("cuda"))
