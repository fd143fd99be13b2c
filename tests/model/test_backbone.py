"""Backbones: the four maps at any size, norms, frozen stages, and weights by file."""

import copy
import dataclasses
import pickle
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpformer.config.model import Backbone as Settings
from mpformer.model import backbone as backbones
from mpformer.model.backbone import Backbone, normalization, timm
from mpformer.types import PIXEL_MEAN, PIXEL_STD, InputError
from tests.servers import closed_port

SWIN = "swin_tiny_patch4_window7_224"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def build(name, **settings):
    torch.manual_seed(0)
    return Backbone(Settings(**{"name": name, "pretrained": None, **settings}))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet101c", (256, 512, 1024, 2048)),
        (SWIN, (96, 192, 384, 768)),
        ("convnext_atto", (40, 80, 160, 320)),
        ("vit_tiny_patch16_224", (256, 256, 256, 256)),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_four_maps_at_their_strides(name, channels, size):
    backbone = build(name).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, *size))
    assert backbone.channels == channels
    assert [tuple(m.shape) for m in maps] == [
        (2, c, size[0] // s, size[1] // s) for c, s in zip(channels, (4, 8, 16, 32))
    ]


def test_swin_maps_are_channels_first_where_height_equals_channels():
    """At 384 x 384 the first map of Swin-T is 96 x 96 x 96: its shape says nothing about its layout."""
    backbone = build(SWIN, output_norms=False).eval()
    images = torch.rand(1, 3, 384, 384)
    with torch.no_grad():
        first = backbone(images)[0]
        wanted = backbone.body(images)[0]
    assert wanted.shape == first.shape == (1, 96, 96, 96)
    assert torch.equal(first, wanted.permute(0, 3, 1, 2))
    assert not torch.equal(first, wanted)


def test_output_norms_are_where_the_official_models_have_them():
    assert [n.normalized_shape[0] for n in build(SWIN).norms] == [96, 192, 384, 768]
    assert build("resnet18").norms is None
    assert build(SWIN, output_norms=False).norms is None
    with_norms = build("resnet18", output_norms=True).eval()
    with torch.no_grad():
        last = with_norms(torch.rand(1, 3, 64, 64))[-1]
    assert last.mean(1).abs().max() < 1e-5  # normalised over channels


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "group_norm"])
def test_norms(norm):
    kinds = {"frozen_bn": "FrozenBatchNorm2d", "bn": "BatchNorm2d", "group_norm": "GroupNorm"}
    body = build("resnet18", norm=norm).body
    assert kinds[norm] in [c.__name__ for c in type(body.bn1).__mro__]
    # frozen statistics come with a frozen affine part
    assert any("bn1" in name for name, _ in body.named_parameters()) == (norm != "frozen_bn")


def test_frozen_statistics_do_not_follow_the_batch():
    backbone = build("resnet18").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64) * 5)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "test_resnet",  # both kinds of block, the stem of resnet101c and its short cuts
        "regnetx_002",
        "tf_efficientnet_lite0",  # with TensorFlow's padding
        pytest.param("tf_efficientnetv2_b0", marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_100", marks=pytest.mark.slow),
        pytest.param("mobilenetv4_conv_small", marks=pytest.mark.slow),
    ],
)
def test_frozen_norms_are_what_they_are_when_folded(name):
    """Random statistics: the maps and the gradients are those of a BatchNorm in evaluation mode."""
    folded, plain = build(name).double(), build(name, norm="bn").double().eval()
    torch.manual_seed(0)
    for buffer in plain.body.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    for module in plain.body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    folded.load_state_dict(plain.state_dict())
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in plain.body.modules())
    beside = norms - (name == "test_resnet")  # in its deep stem the last norm is not beside its convolution
    assert sum(hasattr(module, "norm") for module in folded.body.modules()) == beside
    images = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    results = []
    for backbone in (folded, copy.deepcopy(folded), plain):
        maps = backbone(images)
        sum((m * m).mean() for m in maps).backward()
        own = dict(backbone.named_parameters())
        results.append([*maps, *(own[name].grad for name, _ in folded.named_parameters())])
    for got, copied, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(copied, got)
    assert list(folded.state_dict()) == [k for k in plain.state_dict() if "num_batches_tracked" not in k]


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("resnet18", 0, set()),
        ("resnet18", 1, {"conv1"}),
        ("resnet18", 3, {"conv1", "layer1", "layer2"}),
        (SWIN, 1, {"patch_embed", "layers_0"}),
    ],
)
def test_frozen_stages(name, stages, frozen):
    body = build(name, frozen_stages=stages).body
    assert {n.split(".")[0] for n, p in body.named_parameters() if not p.requires_grad} == frozen


def test_drop_path_is_off_unless_asked_for():
    def rates(body):
        return [m.drop_prob for m in body.modules() if type(m).__name__ == "DropPath" and m.drop_prob]

    assert rates(build(SWIN).body) == []
    assert max(rates(build(SWIN, drop_path=0.3).body)) == pytest.approx(0.3)


# --- weights by file ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param(SWIN, marks=pytest.mark.slow)])
def test_weights_from_a_file(name, suffix, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(name)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    body = build(name, pretrained=str(file)).body
    own = {k.replace("layers_", "layers."): v for k, v in body.state_dict().items()}
    stored = source.state_dict()
    assert all(torch.equal(v, stored[k]) for k, v in own.items())


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_file_with_code_is_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"evil{suffix}"
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps({"model": {"conv1.weight": _Evil()}}))
    else:
        torch.save({"model": {"conv1.weight": _Evil()}}, file)
    with pytest.raises(InputError, match="no file of tensors alone"):
        build("resnet18", pretrained=str(file))
    assert not (tmp_path / "executed").exists()


def test_wrong_weights_are_named(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"encoder.0.weight": torch.zeros(2)}, other)
    with pytest.raises(InputError, match=r"holds no weights of resnet18: 'encoder\.0\.weight"):
        build("resnet18", pretrained=str(other))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a file of weights")
    with pytest.raises(InputError, match="is text, not weights: 'not a file of weights'"):
        build("resnet18", pretrained=str(broken))
    with pytest.raises(InputError, match=r"neither a file nor a tag of resnet18, which has: .*tv_in1k"):
        build("resnet18", pretrained="tv_in1")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        *(("resnet18", prefix) for prefix in ("module.", "model.module.", "student.", "ema_model.")),
        pytest.param(SWIN, "model.module.", marks=pytest.mark.slow),  # prefixes know no backbone
    ],
)
def test_a_wrapped_backbone_is_the_backbone(name, prefix, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(name).state_dict()
    torch.save({"state_dict": {prefix + k: v for k, v in source.items()}, "epoch": 3}, tmp_path / "a.bin")
    body = build(name, pretrained=str(tmp_path / "a.bin")).body
    own = {k.replace("layers_", "layers."): v for k, v in body.state_dict().items()}
    assert all(torch.equal(v, source[k]) for k, v in own.items())
    assert not any("state_dict" in getattr(m, "pretrained_cfg", {}) for m in body.modules())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda k, v: None if k == "layer4.1.conv2.weight" else v,
            r"lacks 1 tensors of resnet18, such as .*conv2",
        ),
        (lambda k, v: None if "running" in k else v, r"has running statistics of 0 norms, resnet18 has 20"),
        (lambda k, v: v[:5] if k == "layer4.1.conv2.weight" else v, "does not fit resnet18: .*size mismatch"),
    ],
)
def test_a_backbone_in_part_is_refused(spoil, expected, tmp_path):
    torch.manual_seed(1)
    spoilt = {k: spoil(k, v) for k, v in timm.create_model("resnet18").state_dict().items()}
    torch.save({k: v for k, v in spoilt.items() if v is not None}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=expected):
        build("resnet18", pretrained=str(tmp_path / "a.pth"))


def test_an_unknown_wrapper_of_a_backbone_is_named(tmp_path):
    state = {f"encoder_q.{k}": v for k, v in timm.create_model("resnet18").state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"begin with 'encoder_q\.', which is no known wrapper"):
        build("resnet18", pretrained=str(tmp_path / "a.pth"))


def test_the_papers_tags_exist():
    for name, tag in {
        "resnet50": "tv_in1k",
        "resnet101": "tv_in1k",
        "resnet101c": "gluon_in1k",
        SWIN: "ms_in1k",
        "swin_small_patch4_window7_224": "ms_in1k",
        "swin_base_patch4_window12_384": "ms_in22k",
        "swin_large_patch4_window12_384": "ms_in22k",
    }.items():
        assert f"{name}.{tag}" in timm.list_pretrained(f"{name}.*")


def test_unknown_and_unfit_models_are_named():
    with pytest.raises(InputError, match="no model 'resnet5'; nearest: resnet50"):
        build("resnet5")
    with pytest.raises(InputError, match="features at strides"):
        build("vit_base_patch32_224")
    with pytest.raises(InputError, match="has no stages"):
        build("vit_tiny_patch16_224", frozen_stages=1)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"name": "resnet50", "pretrained": "tv_in1k"}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"name": "tf_efficientnet_lite0", "pretrained": "in1k"}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ({"name": "tf_efficientnet_lite0", "pretrained": "my.safetensors"}, (0.5,) * 3, (0.5,) * 3),
        ({"name": "vit_base_patch16_clip_224", "pretrained": "openai"}, OPENAI_MEAN, OPENAI_STD),
        ({"name": "tf_efficientnet_lite0", "pretrained": None}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (
            {"name": "tf_efficientnet_lite0", "pretrained": "in1k", "mean": (51.0,) * 3, "std": (102.0,) * 3},
            (0.2,) * 3,
            (0.4,) * 3,
        ),
    ],
)
def test_images_are_normalised_as_the_weights_were_trained(settings, mean, std):
    found = normalization(Settings(**settings))
    assert found.mean == pytest.approx([255 * m for m in mean], abs=1e-3)
    assert found.std == pytest.approx([255 * s for s in std], abs=1e-3)


def test_the_papers_normalisation_is_what_it_was_to_the_bit():
    found = normalization(Settings())
    assert (found.mean, found.std) == (PIXEL_MEAN, PIXEL_STD)


def test_mean_without_std_is_refused():
    with pytest.raises(ValueError, match="both or neither"):
        Settings(mean=(0, 0, 0))


def test_two_files_of_one_network_give_the_same_maps_each_with_its_normalisation(sample_data):
    """Of one of them the difference to ImageNet's normalisation is folded into the first convolution."""
    name, folder = "tf_efficientnet_lite0", sample_data.parent / "weights"
    if not folder.is_dir():
        pytest.skip(f"no pretrained weights at {folder}")
    images = torch.randint(0, 256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(0)).float()
    maps = {}
    for file, given in (("", {}), (".imagenet_norm", {"mean": PIXEL_MEAN, "std": PIXEL_STD})):
        settings = Settings(name=name, pretrained=str(folder / f"{name}{file}.safetensors"), **given)
        used = normalization(settings)
        shown = (images - torch.tensor(used.mean).view(3, 1, 1)) / torch.tensor(used.std).view(3, 1, 1)
        with torch.no_grad():
            maps[file] = Backbone(settings).eval()(shown)
    for own, folded in zip(*maps.values()):
        # padding is of another colour, and 127.5 is 127 for the file's makers
        inner = (..., slice(1, -1), slice(1, -1)) if own.shape[-1] > 4 else ...
        assert float((own - folded)[inner].abs().mean() / own.abs().mean()) < 0.1


# --- published weights without a network ------------------------------------------------------------


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """No hub, and an empty cache of it."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_weights_that_are_not_reachable_are_one_line_at_once(unreachable, monkeypatch):
    """The hub's own client is not asked: it would try for a minute."""
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(InputError) as caught:
        build("resnet18", pretrained="a1_in1k")
    line = str(caught.value)
    assert "resnet18.a1_in1k are neither cached nor reachable" in line
    assert "127.0.0.1 is not reachable: Connection refused" in line
    assert "model.backbone.pretrained=FILE reads a file of them" in line
    assert "\n" not in line


def test_a_driver_has_them_fetched_once_as_timm_does(unreachable, monkeypatch, tmp_path):
    settings = Settings(name="resnet18", pretrained="a1_in1k")
    with pytest.raises(InputError, match=r"resnet18\.a1_in1k are neither cached nor reachable"):
        backbones.fetch_pretrained(settings)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and no more is asked of it
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        fetched = []
        monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda *asked: fetched.append(asked))
        backbones.fetch_pretrained(settings)
        assert fetched == [("timm/resnet18.a1_in1k", "pytorch_model.bin")]

        def fail(*asked):
            raise ValueError("no answer")  # whatever the client's HTTP library raises

        monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fail)
        with pytest.raises(InputError, match=r"neither cached nor reachable \(no answer\)"):
            backbones.fetch_pretrained(settings)
        put_in_cache(tmp_path / "hub", timm.create_model("resnet18", pretrained=False))
        backbones.fetch_pretrained(settings)  # nothing to fetch


def test_weights_that_lie_outside_of_the_hub_are_looked_for_there(unreachable, monkeypatch, tmp_path):
    url = f"http://127.0.0.1:{closed_port()}/legacy.pth"
    notes = dataclasses.replace(timm.get_pretrained_cfg("resnet18.a1_in1k"), hf_hub_id=None, url=url)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: notes)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    settings = Settings(name="resnet18", pretrained="a1_in1k")
    with pytest.raises(InputError, match=r"legacy\.pth: 127\.0\.0\.1 is not reachable"):
        backbones.fetch_pretrained(settings)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "legacy.pth").touch()
    backbones.fetch_pretrained(settings)
    assert backbones._overlay("resnet18.a1_in1k") == {"file": str(tmp_path / "checkpoints/legacy.pth")}


def test_files_and_random_weights_need_no_hub(unreachable, tmp_path):
    backbones.fetch_pretrained(Settings(name="resnet18", pretrained=None))
    (tmp_path / "a.pth").touch()
    backbones.fetch_pretrained(Settings(name="resnet18", pretrained=str(tmp_path / "a.pth")))
    with pytest.raises(InputError, match=r"'nowhere\.pth' is neither a file nor a tag of resnet18"):
        backbones.fetch_pretrained(Settings(name="resnet18", pretrained="nowhere.pth"))


def put_in_cache(hub, model):
    """The weights as the hub's own client leaves them."""
    folder = hub / "models--timm--resnet18.a1_in1k"
    snapshot = folder / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    save_file(dict(model.state_dict()), snapshot / "model.safetensors")


def test_weights_in_the_hub_s_cache_need_no_network(unreachable, tmp_path):
    stored = timm.create_model("resnet18", pretrained=False)
    with torch.no_grad():
        stored.conv1.weight.fill_(0.25)
    put_in_cache(tmp_path / "hub", stored)
    backbone = build("resnet18", pretrained="a1_in1k")
    own = dict(backbone.body.state_dict())
    assert own
    assert all(torch.equal(stored.state_dict()[name], tensor) for name, tensor in own.items())
