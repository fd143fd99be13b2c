"""One training step: every switch, every batch, however it is dealt out to micro-batches and workers."""

import copy
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mpformer.config import Config
from mpformer.model.architecture import build_model
from mpformer.model.matcher import NonFiniteError
from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from mpformer.types import Batch, Target
from tests.train.conftest import make_batch

CLASSES = 3


def settings(**model) -> Config:
    """A tiny model with the sections of `model` laid over it."""
    base = {
        "backbone": {"name": "test_resnet", "pretrained": None, "norm": "group_norm"},
        "pixel_decoder": {"channels": 16, "layers": 1, "heads": 2, "ffn": 16},
        "decoder": {"layers": 4, "queries": 6, "heads": 2, "ffn": 16},
        "pilot": {"queries": 12},
        "loss": {"points": 32},
    }
    for section, values in model.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    by_class = base.get("output") == "per_pixel" or base["loss"].get("assignment") == "fixed"
    data = {"task": "semantic" if by_class else "instance"}
    return Config.model_validate({"model": base, "data": data, "train": {"lr": 1e-3, "clip_norm": 1.0}})


def gradients_of_step(config, batch, micro_batch=None, model=None):
    """The step's result and its unclipped gradients; the optimiser is kept from using them."""
    torch.manual_seed(0)
    model = model or build_model(config.model, CLASSES)
    model.train()
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch": micro_batch, "clip_norm": 0.0})}
    )
    result = train_step(model, Keep(), batch, config, Timers(), classes=CLASSES)
    return result, {n: p.grad for n, p in model.named_parameters()}


class Keep:
    """An optimiser that leaves weights and gradients as they are."""

    def step(self):
        pass

    def zero_grad(self, set_to_none=True):
        pass


MASKFORMER = {
    "pixel_decoder": {"kind": "fpn"},
    "decoder": {
        "layers": 2,
        "attention": "cross",
        "features": "stride_32",
        "memory": "backbone",
        "query_features": "zero",
        "order": "self_first",
    },
    "loss": {"mask_loss": "focal", "points": None},
}
PER_PIXEL = {
    "output": "per_pixel",
    "pixel_decoder": {"kind": "fpn"},
    "decoder": {"layers": 0},
    "pilot": {"queries": 0},
}

SWITCHES = {
    "mp-former": {},
    "mask2former": {"pilot": {"queries": 0}},
    "no noise": {"pilot": {"noise": {"kind": "none"}, "label_noise": 0.0}},
    "shift": {"pilot": {"noise": {"kind": "shift"}}},
    "scale": {"pilot": {"noise": {"kind": "scale"}}},
    "all noise": {"pilot": {"noise": [{"kind": "shift"}, {"kind": "scale"}, {"kind": "point"}]}},
    "first layer": {"pilot": {"layers": "first"}},
    "some layers": {"pilot": {"layers": [2, 4]}},
    "matched pilots": {"pilot": {"assignment": "match"}},
    "released": {"pilot": {"flavour": "released"}},
    "released shift": {"pilot": {"flavour": "released", "noise": {"kind": "shift"}}},
    "released scale": {"pilot": {"flavour": "released", "noise": {"kind": "scale"}}},
    "all large": {"decoder": {"features": "stride_8"}},
    "single small": {"decoder": {"features": "stride_32"}},
    "dropout": {"decoder": {"dropout": 0.1}},
    "fixed matching": {"loss": {"matching": "last_head"}},
    "layer consistency": {"loss": {"consistency_weight": 1.0}},
    "full masks": {"loss": {"points": None, "consistency_weight": 1.0}},
    "shared pilot points": {"loss": {"shared_pilot_points": True}},
    "padding ignored": {"loss": {"padding": "ignored"}},
    "frozen statistics": {"backbone": {"norm": "frozen_bn"}},
    "live statistics": {"backbone": {"norm": "bn"}},
    "output norms": {"backbone": {"output_norms": True}},
    "drop path": {"backbone": {"drop_path": 0.2}},
    "cross-attention": {"decoder": {"attention": "cross"}},
    "smca": {"decoder": {"attention": "smca"}},
    "mask pooling": {"decoder": {"attention": "mask_pooling"}},
    "all scales": {"decoder": {"features": "all_scales"}},
    "medium": {"decoder": {"features": "stride_16"}},
    "learned queries": {"decoder": {"query_features": "learned"}},
    "zero queries": {"decoder": {"query_features": "zero"}},
    "self-attention first": {"decoder": {"order": "self_first"}},
    "no self-attention": {"decoder": {"self_attention": False}},
    "no layers": {"decoder": {"layers": 0}},
    "encoder": {"decoder": {"encoder_layers": 2}},
    "fpn": {"pixel_decoder": {"kind": "fpn"}},
    "fpn as printed": {"pixel_decoder": {"kind": "fpn", "last_kernel": 1}},
    "semantic fpn": {"pixel_decoder": {"kind": "semantic_fpn"}},
    "bifpn": {"pixel_decoder": {"kind": "bifpn"}},
    "fapn": {"pixel_decoder": {"kind": "fapn"}},
    "focal": {"loss": {"mask_loss": "focal"}},
    "match masks": {"loss": {"match_points": None}},
    "match points, learn masks": {"loss": {"points": None, "match_points": 32}},
    "boxes": {"loss": {"match_by": "boxes"}},
    "matched by boxes": {"loss": {"match_by": "boxes"}, "pilot": {"assignment": "match"}},
    "piloted maskformer": MASKFORMER,
    "maskformer": {**MASKFORMER, "pilot": {"queries": 0}},
    "maskformer, encoder": {
        **MASKFORMER,
        "decoder": {**MASKFORMER["decoder"], "encoder_layers": 2, "dropout": 0.1},
    },
    "maskformer, fixed": {
        **MASKFORMER,
        "pilot": {"queries": 0},
        "loss": {**MASKFORMER["loss"], "assignment": "fixed"},
    },
    "per-pixel baseline": PER_PIXEL,
    "per-pixel baseline+": {**PER_PIXEL, "decoder": MASKFORMER["decoder"]},
    "per-pixel baseline+, focal and dice": {
        **PER_PIXEL,
        "decoder": MASKFORMER["decoder"],
        "loss": {"per_pixel": "focal_dice", "mask_loss": "focal"},
    },
}


def one_object_per_class(batch: Batch) -> Batch:
    """The ground truth of a semantic task: regions of a class are one, and no two classes overlap."""
    targets = []
    for target in batch.targets:
        labels = target.labels.unique()
        masks = [target.masks[target.labels == label].any(0) for label in labels]
        free = torch.ones(batch.images.shape[2:], dtype=torch.bool)
        for mask in masks:
            mask &= free
            free &= ~mask
        targets.append(Target(labels, torch.stack(masks) if masks else target.masks))
    return replace(batch, targets=tuple(targets))


COUNTS = ([3, 0], [0, 0], [5, 120])
ALWAYS = ("mp-former", "mask2former", "released", "matched pilots")


@pytest.mark.parametrize(
    ("switch", "counts"),
    [
        pytest.param(s, c, id=f"{s} {c}", marks=() if s in ALWAYS else pytest.mark.slow)
        for s in SWITCHES
        for c in COUNTS
    ],
)
def test_every_parameter_gets_a_finite_gradient(switch, counts):
    config = settings(**SWITCHES[switch])
    batch = make_batch(counts, classes=CLASSES)
    if config.data.task == "semantic":
        batch = one_object_per_class(batch)
    result, gradients = gradients_of_step(config, batch)
    assert torch.isfinite(result.total)
    assert [n for n, g in gradients.items() if g is None] == []
    assert [n for n, g in gradients.items() if not torch.isfinite(g).all()] == []
    if counts == [3, 0] and switch == "mp-former":
        # timm starts residual branches at zero, and deformable attention starts without looking at positions:
        # what only acts through them has a gradient of zero at first
        idle = {n for n, g in gradients.items() if not g.any()}
        assert {n for n in idle if not n.startswith("backbone.body.layer")} == {"pixel_decoder.level_embed"}


def test_frozen_stages_get_no_gradient():
    config = settings(backbone={"norm": "frozen_bn", "frozen_stages": 2})
    _, gradients = gradients_of_step(config, make_batch([3, 2]))
    frozen = {n for n, g in gradients.items() if g is None}
    assert frozen == {n for n in gradients if n.startswith(("backbone.body.conv1", "backbone.body.layer1."))}


def test_losses_of_all_heads_and_parts_add_up():
    config = settings()
    result, _ = gradients_of_step(config, make_batch([3, 1]))
    sums = {"loss", "pilot_loss"}
    terms = {n: float(v) for n, v in result.losses.items() if n not in sums}
    assert len(terms) == 5 * 2 * 3
    assert {"loss_mask", "head_0/loss_class", "pilot_loss_dice", "head_3/pilot_loss_mask"} <= set(terms)
    assert sum(terms.values()) == pytest.approx(float(result.total), rel=1e-5)
    matching = sum(v for n, v in terms.items() if n.rpartition("/")[2].startswith("loss_"))
    assert float(result.losses["loss"]) == pytest.approx(matching, rel=1e-5)
    assert float(result.losses["pilot_loss"]) == pytest.approx(sum(terms.values()) - matching, rel=1e-5)


def test_pilots_leave_the_matching_losses_alone():
    """Same points, same matching: MP-Former and Mask2Former start from the very same losses."""
    batch = make_batch([3, 7])
    piloted, _ = gradients_of_step(settings(), batch)
    model = build_model(settings().model, CLASSES)
    torch.manual_seed(0)
    model = build_model(settings().model, CLASSES)
    plain_config = settings(pilot={"queries": 0})
    plain = build_model(plain_config.model, CLASSES)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pilot_embed" not in k})
    without, _ = gradients_of_step(plain_config, batch, model=plain)
    assert "pilot_loss" not in without.losses
    for name, value in without.losses.items():
        assert float(piloted.losses[name]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize(
    "switch",
    [
        "mp-former",
        *(
            pytest.param(switch, marks=pytest.mark.slow)
            for switch in ("matched pilots", "layer consistency", "fixed matching")
        ),
    ],
)
def test_micro_batches_add_up_to_the_whole_batch(switch):
    config = settings(**SWITCHES[switch])
    batch = make_batch([3, 0, 20, 1])
    whole, expected = gradients_of_step(config, batch)
    for micro_batch in (1, 2, 3):
        parts, gradients = gradients_of_step(config, batch, micro_batch)
        assert float(parts.total) == pytest.approx(float(whole.total), rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)
        assert float(parts.grad_norm) == pytest.approx(float(whole.grad_norm), rel=1e-4)


def test_a_step_changes_the_weights_and_clips():
    config = settings()
    model = build_model(config.model, CLASSES).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, config.train)
    result = train_step(model, optimizer, make_batch([3, 2]), config, Timers(), classes=CLASSES)
    assert float(result.grad_norm) > 1  # before clipping
    heads = [(n, p) for n, p in model.named_parameters() if not n.startswith("backbone")]
    assert [n for n, p in heads if torch.equal(before[n], p)] == []
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("where", "message"), [("mask_features", "matching"), ("class_embed", "image-1")])
def test_not_a_number_stops_before_the_weights_change(where, message):
    config = settings()
    model = build_model(config.model, CLASSES).train()
    module = model.pixel_decoder.mask_features if where == "mask_features" else model.decoder.class_embed
    with torch.no_grad():
        module.bias.fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, config.train)
    with pytest.raises(NonFiniteError, match=message if where == "mask_features" else "image-0"):
        train_step(model, optimizer, make_batch([3, 2]), config, Timers(), classes=CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_an_inference_before_does_not_disturb_training():
    config = settings(backbone={"name": "swin_tiny_patch4_window7_224", "norm": "frozen_bn"})
    model = build_model(config.model, CLASSES)
    batch = make_batch([2], size=96)
    with torch.inference_mode():
        model.eval()(batch.images)
    _, gradients = gradients_of_step(config, batch, model=model)
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())


# --- any number of workers ------------------------------------------------------------------------

SEVEN_IMAGES = {
    "with objects": [5, 0, 3, 30, 1, 2, 4],
    "first workers only": [5, 2, 0, 0, 0, 0, 0],
    "no objects at all": [0, 0, 0, 0, 0, 0, 0],
}
"""Object counts; 2, 3 and 4 workers cannot share seven images evenly."""
MICRO_BATCHES = (None, 1, 2)


def _step_in_double(rank, world, config, counts):
    """Loss share, gradient norm and gradients of a worker's slice of the global batch, in float64."""
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).double().train()
    from mpformer.data.pipeline import rank_positions  # tests/gpu imports this file where there is no ray

    share = make_batch(counts).select(rank_positions(0, len(counts), rank, world))
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    result = train_step(wrapped, Keep(), share, config, Timers(), classes=CLASSES)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    return float(result.total), float(result.grad_norm), gradients


def _with_micro_batch(micro_batch):
    train = {"clip_norm": 0.0, "micro_batch": micro_batch}
    config = settings()
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _work(rank, world, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        for case, counts in SEVEN_IMAGES.items():
            for micro_batch in MICRO_BATCHES:
                config = _with_micro_batch(micro_batch)
                results[case, micro_batch, rank] = _step_in_double(rank, world, config, counts)
        results["beside a failing one", rank] = _step_beside_a_failing_worker(rank)
    finally:
        dist.destroy_process_group()


def _step_beside_a_failing_worker(rank):
    """What each worker is told where the second computes no number, and whether its weights are as before."""
    config = settings()
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).train()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if rank == 1:
        with torch.no_grad():
            model.decoder.class_embed.bias.fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    share = make_batch([3, 2, 1]).select(range(rank, rank + 1))
    try:
        train_step(wrapped, build_optimizer(model, config.train), share, config, Timers(), classes=CLASSES)
    except NonFiniteError as error:
        after = model.state_dict()
        kept = all(torch.equal(after[n].nan_to_num(), v.nan_to_num()) for n, v in before.items())
        return str(error), kept
    return None


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory):
    """What three processes have computed: starting them takes longer than all that they do."""
    world = 3
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_work, (world, str(tmp_path_factory.mktemp("workers") / "store"), results), nprocs=world)
        return dict(results)


@pytest.mark.slow
def test_any_number_of_workers_computes_the_step_of_one(three_workers):
    """One global batch dealt out unevenly, each share accumulated from micro-batches: the same gradient.

    Three workers here, two in whole runs (tests/e2e/test_training.py).
    """
    for case, counts in SEVEN_IMAGES.items():
        loss, norm, expected = _step_in_double(0, 1, _with_micro_batch(None), counts)
        for micro_batch in MICRO_BATCHES:
            parts = [three_workers[case, micro_batch, rank] for rank in range(3)]
            assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-12), (case, micro_batch)
            for _, grad_norm, gradients in parts:
                assert grad_norm == pytest.approx(norm, rel=1e-12), (case, micro_batch)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-12)


@pytest.mark.slow
def test_one_failing_worker_stops_all_before_the_weights_change(three_workers):
    told = [three_workers["beside a failing one", rank] for rank in range(3)]
    assert told[1] == ("matching: a cost of image image-1 is not finite", True)
    assert told[0] == told[2] == ("a value of another worker is not finite", True)
