"""Compiled, or with activations computed twice: the same losses and gradients."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mpformer.model.architecture import build_model
from mpformer.train.execution import prepare
from tests.model.samples import pilots_for
from tests.train.conftest import make_batch
from tests.train.test_step import CLASSES, gradients_of_step, settings


def prepared(config, **train):
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES)
    names = list(model.state_dict())
    prepare(model, config.train.model_copy(update=train))
    assert list(model.state_dict()) == names
    return model


def stored_bytes(run):
    """What autograd keeps for the backward pass of everything in `run`."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(sizes)


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    config = settings(pixel_decoder={"layers": 3}, decoder={"dropout": 0.1})
    batch = make_batch([3, 1])

    def run(**train):
        model = prepared(config, **train).train()
        features = model.backbone(batch.images.float())
        torch.manual_seed(1)  # of dropout
        return stored_bytes(lambda: model.decoder(*model.pixel_decoder(features)))

    (plain, kept), (again, kept_less) = run(), run(activation_checkpointing=True)
    assert kept_less < 0.8 * kept
    for a, b in zip(plain.heads, again.heads):
        assert torch.equal(a.mask_logits, b.mask_logits)
    config = settings()
    (one, expected), (other, gradients) = (
        gradients_of_step(config, batch, model=prepared(config, activation_checkpointing=value))
        for value in (False, True)
    )
    assert float(one.total) == float(other.total)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_channels_last_is_what_convolutions_get_and_parameters_keep_their_layout():
    config = settings(backbone={"norm": "frozen_bn"})
    batch = make_batch([3, 1])
    plain, expected = gradients_of_step(config, batch, model=prepared(config))
    model = prepared(config, channels_last=True)
    layouts = {module: [] for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d)}

    def note(module, inputs):
        layouts[module].append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in layouts:
        module.register_forward_pre_hook(note)
    result, gradients = gradients_of_step(config, batch, model=model)
    assert all(seen == [True] for seen in layouts.values())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert float(result.total) == pytest.approx(float(plain.total), rel=1e-4)
    for name, gradient in gradients.items():
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-2)


SWIN = {"name": "swin_tiny_patch4_window7_224"}
PARTS = ("backbone", "pixel_decoder", "decoder")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler itself is slow on a busy machine
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler itself
@pytest.mark.parametrize(
    ("switch", "train", "parts"),
    [
        ({}, {}, PARTS),
        # of these only the parts that they change
        ({"backbone": SWIN}, {}, ["backbone"]),
        ({}, {"activation_checkpointing": True}, ["pixel_decoder", "decoder"]),
        ({"pilot": {"queries": 0}}, {}, ["decoder"]),
    ],
    ids=["mp-former", "swin", "activation checkpointing", "mask2former"],
)
def test_each_part_is_one_graph_whatever_the_number_of_pilots(switch, train, parts):
    """No graph breaks, and no compilation anew with every batch: it would take longer than the batch."""
    torch.compiler.reset()
    config = settings(**{"backbone": {"norm": "frozen_bn"}, "decoder": {"layers": 2}, **switch})
    model = prepared(config, **train).train()
    counters = {name: CompileCounter() for name in parts}
    for name, counter in counters.items():
        getattr(model, name).compile(backend=counter, fullgraph=True)
    slots = set()
    for counts in ([3, 1], [7, 0], [5, 5]):
        batch, pilots = make_batch(counts), None
        if config.model.pilot.queries:
            pilots = pilots_for(batch.targets, config.model, structure=model.structure)
            slots.add(pilots.labels.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch.images, pilots)
        output.heads[-1].mask_logits.sum().backward()
    graphs = {name: counter.frame_count for name, counter in counters.items()}
    # the second number of pilots makes the graph of all others
    expected = {"backbone": 1, "pixel_decoder": 1, "decoder": 2 if len(slots) > 1 else 1}
    assert graphs == {name: expected[name] for name in parts}
    assert len(slots) == (3 if config.model.pilot.queries else 0)


def compared(config, batch, compiled):
    """A step of the compiled model against one of the same model as it is."""
    plain, expected = gradients_of_step(config, batch, model=prepared(config))
    compiled.zero_grad()
    result, gradients = gradients_of_step(config, batch, model=compiled)
    assert float(result.total) == pytest.approx(float(plain.total), rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler itself is slow on a busy machine
@pytest.mark.filterwarnings("default")  # the compiler of torch calls what torch itself deprecates
def test_traced_steps_have_the_same_losses_and_gradients(monkeypatch):
    """All of the compiler but the making of machine code; also another number of pilots: another shape."""
    torch.compiler.reset()
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_, backend="aot_eager"))
    config = settings(backbone={"norm": "frozen_bn"}, decoder={"layers": 2})
    compiled = prepared(config, compile=True)
    for counts in ([3, 1], [5, 2]):
        compared(config, make_batch(counts), compiled)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler itself is slow on a busy machine
@pytest.mark.filterwarnings("default")  # the compiler of torch calls what torch itself deprecates
def test_a_compiled_decoder_has_the_same_losses_and_gradients(monkeypatch):
    """With machine code: of the part with masks and pilots, which takes a minute to make."""
    torch.compiler.reset()
    config = settings(decoder={"layers": 1})
    model = build_model(config.model, CLASSES)
    monkeypatch.setattr(type(model), "compiled_parts", lambda self: [self.decoder])
    compared(config, make_batch([3, 1]), prepared(config, compile=True))
