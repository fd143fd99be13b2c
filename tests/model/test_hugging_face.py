"""Our model against `transformers`' Mask2Former with the same weights: outputs, loss, gradients, files."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpformer.config import Config
from mpformer.config import data as config_data
from mpformer.model.architecture import build_model
from mpformer.model.losses import Normalizers, matching_losses
from mpformer.model.matcher import match
from mpformer.model.objects import in_a_row
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.loading import checkpoint_metadata, export_huggingface, import_weights
from mpformer.ops import mask_points
from mpformer.types import ClassTable, InputError, Target
from tests.model.hugging_face import (
    SMALL,
    gradients_by_our_names,
    normalized,
    random_mask2former,
    to_ours,
    transformers,
)
from tests.model.samples import pairs_of, tiny_model

pytestmark = pytest.mark.slow

KINDS = ("resnet18", "swin_tiny", pytest.param("resnet50", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    reference = random_mask2former(request.param, **SMALL)
    ours, config, report = to_ours(reference, tmp_path_factory.mktemp(request.param))
    return SimpleNamespace(kind=request.param, reference=reference, ours=ours, config=config, report=report)


def all_heads(reference, images):
    """Class and mask logits of the reference, head 0 first."""
    with torch.no_grad():
        out = reference(normalized(images), output_auxiliary_logits=True)
    heads = [(h["class_queries_logits"], h["masks_queries_logits"]) for h in out.auxiliary_logits]
    return [*heads, (out.class_queries_logits, out.masks_queries_logits)]


def assert_same_heads(ours, reference, images, tolerance):
    with torch.no_grad():
        out = ours(images, all_heads=True)
    wanted = all_heads(reference, images)
    assert len(out.heads) == len(wanted)
    for head, (class_logits, mask_logits) in zip(out.heads, wanted):
        # the reference must not be trivially flat for a comparison to mean anything
        assert mask_logits.std() > 0.1
        torch.testing.assert_close(head.class_logits, class_logits, atol=tolerance, rtol=0)
        torch.testing.assert_close(head.mask_logits, mask_logits, atol=tolerance, rtol=0)


SIZES = [(64, 64), (96, 160), (224, 128)]


def test_all_heads_agree_in_float64(pair):
    images = torch.rand(2, 3, 96, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 255
    ours, reference = pair.ours.double(), pair.reference.double()
    try:
        assert_same_heads(ours, reference, images, 1e-5)  # sine positions are float32 in both
    finally:
        ours.float(), reference.float()


@pytest.mark.parametrize("size", SIZES)
def test_all_heads_agree_in_float32(pair, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 255
    assert_same_heads(pair.ours, pair.reference, images, 1e-4)


def test_everything_in_the_folder_is_used(pair):
    assert pair.report.reinitialized == ()
    unused = ("num_batches_tracked", "criterion.empty_weight", "swin.layernorm")
    assert all(any(u in name for u in unused) for name in pair.report.left_over)
    assert len(pair.report.loaded) == len(pair.ours.state_dict())


def test_last_head_only_in_inference(pair):
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        (last,) = pair.ours(images).heads
        every = pair.ours(images, all_heads=True).heads
    assert torch.equal(last.mask_logits, every[-1].mask_logits)
    assert torch.equal(last.class_logits, every[-1].class_logits)


class Given:
    """Points that are given, call by call, in the place of `Draws`."""

    def __init__(self, *calls):
        self.calls = list(calls)

    def some(self, rows):
        return Given(*(values[rows] for values in self.calls))

    def points(self, count):
        value = self.calls.pop(0)
        assert value.shape[1:] == (count, 2)
        return value


class Replay:
    """Random numbers that are those which the reference has drawn, in the place of `SampleRandom`."""

    def __init__(self, shared, candidates, uniform):
        self.calls = {"matching": (torch.stack(shared),), "losses": (candidates, uniform)}

    def rows(self, purpose, images, rows, places):
        return Given(*self.calls[purpose])


def reference_loss(reference, images, targets, monkeypatch):
    """Total loss, and for each head (head 0 first) the random numbers it used."""
    drawn = []
    real = torch.rand

    def recording(*args, **kwargs):
        # numbers that a packed point can hold
        values = (((real(*args, **kwargs) * 65536).floor() + 0.5) / 65536).to(images.dtype)
        drawn.append(values)
        return values

    monkeypatch.setattr(torch, "rand", recording)
    out = reference(
        normalized(images),
        mask_labels=[t.masks.to(images.dtype) for t in targets],
        class_labels=[t.labels for t in targets],
    )
    monkeypatch.undo()
    per_head = len(targets) + 2
    assert len(drawn) == 10 * per_head
    heads = [drawn[i : i + per_head] for i in range(0, len(drawn), per_head)]
    replays = [Replay([d[0] for d in h[: len(targets)]], h[-2], h[-1]) for h in heads]
    # the reference computes its last head first
    return out.loss, [*replays[1:], replays[0]]


@pytest.mark.parametrize(
    ("kind", "dtype", "loss_tolerance", "gradient_tolerance"),
    [
        ("resnet18", torch.float32, 1e-5, 1e-4),
        pytest.param("swin_tiny", torch.float64, 1e-7, 1e-6, marks=pytest.mark.slow),
        pytest.param("swin_tiny", torch.float32, 1e-5, 1e-4, marks=pytest.mark.slow),
        pytest.param("resnet50", torch.float32, 1e-5, 1e-4, marks=pytest.mark.slow),
        pytest.param("resnet50", torch.float64, 1e-7, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_agree(kind, dtype, loss_tolerance, gradient_tolerance, monkeypatch, tmp_path):
    reference = random_mask2former(kind, gain=0.2, **SMALL)
    ours, config, _ = to_ours(reference, tmp_path)
    random = torch.Generator().manual_seed(3)
    images = (torch.rand(2, 3, 96, 128, generator=random) * 255).to(dtype)
    targets = []
    for count in (3, 5):
        masks = torch.zeros(count, 96, 128, dtype=torch.bool)
        for mask in masks:
            y, x = (int(torch.randint(0, 64, (), generator=random)) for _ in range(2))
            mask[y : y + 30, x : x + 50] = True
        targets.append(Target(torch.randint(0, 7, (count,), generator=random), masks))
    reference.to(dtype), ours.to(dtype)
    torch.manual_seed(4)
    expected, replays = reference_loss(reference, images, targets, monkeypatch)
    expected.backward()

    settings, queries = config.model.loss, config.model.decoder.queries
    normalizers = Normalizers(8.0, 8 + 0.1 * (2 * queries - 8), 1.0, 1.0, 2.0 * queries)
    monkeypatch.setattr(mask_points, "has_kernel", lambda _: False)  # kernels make their points themselves
    objects, total = in_a_row(targets), torch.zeros((), dtype=dtype)
    for head, draws in zip(ours(images, all_heads=True).heads, replays):
        pairs = pairs_of(match(head, objects, settings, draws, ["a", "b"]), objects, draws)
        parts = matching_losses([head], objects, pairs, normalizers, settings)
        total = total + sum(parts.values()).sum()
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=loss_tolerance)

    own = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    wanted = gradients_by_our_names(reference, own, tmp_path / "gradients")
    difference = torch.cat([(p.grad - wanted[name]).flatten() for name, p in own.items()])
    overall = torch.cat([wanted[name].flatten() for name in own])
    assert float(difference.norm() / overall.norm()) < gradient_tolerance
    for name, parameter in own.items():
        # beside its own size: a key's bias has no gradient but rounding
        size = wanted[name].norm() + 1e-4 * overall.norm()
        assert float((parameter.grad - wanted[name]).norm() / size) < 10 * gradient_tolerance, name


def test_export_is_read_by_transformers_unchanged(pair, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(
        pair.ours.state_dict(), file, checkpoint_metadata(Config(model=pair.config.model), pair.ours.classes)
    )
    export_huggingface(file, tmp_path / "exported")
    back, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wanted = pair.reference.state_dict()
    got = back.state_dict()
    for name, tensor in wanted.items():
        if "swin.layernorm" not in name:  # decides nothing in a Mask2Former
            assert torch.equal(got[name], tensor), name
    assert back.config.id2label == {i: f"LABEL_{i}" for i in range(7)}


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        import_weights(tmp_path, tmp_path / "out.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(InputError, match="'mask2former' or 'maskformer' is expected, not 'detr'"):
        import_weights(tmp_path, tmp_path / "out.safetensors")


def seen_cells(reference, image):
    """For each layer, which cells [1,Q,h*w] the queries of the reference look at."""
    blocked = []

    def record(module, args, kwargs):
        blocked.append(kwargs["attn_mask"])

    layers = reference.model.transformer_module.decoder.layers
    hooks = [layer.cross_attn.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    all_heads(reference, image)
    for hook in hooks:
        hook.remove()
    return [~b[:1] for b in blocked]  # the same for every attention head


@contextmanager
def looking_at(ours, cells):
    """Within it, the queries of our model look at these cells of each layer; yields what they wanted."""
    wanted = []

    def replace(index):
        def hook(module, args):
            wanted.append(args[3])
            return (*args[:3], cells[index])

        return hook

    layers = enumerate(ours.decoder.layers)
    hooks = [layer.cross_attn.register_forward_pre_hook(replace(i)) for i, layer in layers]
    yield wanted
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet50", "swin_tiny"])
def test_full_size_models_agree(kind, tmp_path):
    """All heads: in float64 to 1e-5; in float32 to 1e-4, at two sizes, while both look at the same cells.

    Masked attention is not continuous: a mask logit within rounding of the threshold opens or closes a cell.
    With a hundred queries and 6,400 cells some logit always is, so float32 is compared with the reference's
    cells, and the cells that ours would have chosen otherwise are counted.
    """
    reference = random_mask2former(kind, gain=0.3, labels=80)
    ours, _, _ = to_ours(reference, tmp_path)
    sizes = ((384, 384), (480, 640))
    images = [torch.rand(1, 3, *s, generator=torch.Generator().manual_seed(5)) * 255 for s in sizes]
    for image in images:
        cells = seen_cells(reference, image)
        with looking_at(ours, cells) as wanted:
            assert_same_heads(ours, reference, image, 1e-4)
        differing = sum(int((w != c).sum()) for w, c in zip(wanted, cells))
        assert differing <= 1e-5 * sum(c.numel() for c in cells)
    ours, reference = ours.double(), reference.double()
    assert_same_heads(ours, reference, images[0].double(), 1e-5)


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        (config_data.TestResize(short=96, long=256), (96, 128)),
        (config_data.TestResize(short=96, long=64), (64, 64)),  # 48 x 64, brought to a multiple of 32
        (config_data.TestResize(short=160, long=None), (160, 224)),  # 160 x 213
        (config_data.TestResize(short=None, long=320), (256, 320)),  # 240 x 320
        (config_data.TestResize(short=None, long=None), (480, 640)),
    ],
)
def test_an_export_s_images_are_resized_as_in_its_evaluation(pair, tmp_path, resize, expected):
    write_huggingface(pair.ours, tmp_path, resize)
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(tmp_path)
    image = np.zeros((480, 640, 3), np.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape[2:] == expected


def test_a_resnet_with_group_norm_is_not_written_as_one_with_batch_norm(tmp_path):
    """Both have the same tensors by name, but for the running means, which would be those of no training."""
    model = build_model(tiny_model().with_backbone(name="resnet18"), ClassTable.numbered(2))
    with pytest.raises(InputError, match=r"backbone\.norm is group_norm"):
        write_huggingface(model, tmp_path / "out", config_data.TestResize())
    assert not (tmp_path / "out").exists()
