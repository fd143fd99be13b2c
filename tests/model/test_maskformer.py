"""MaskFormer: against `transformers`, against a DETR decoder written out here, and its weights files."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.architecture import build_model
from mpformer.model.decoder import QueryDecoder
from mpformer.model.encoder import Encoder
from mpformer.model.position import sine_position
from mpformer.model.weights.loading import export_huggingface, import_weights, load_checkpoint
from mpformer.model.weights.names_maskformer import official_maskformer_names
from tests.model.hugging_face import STAGES, normalized, transformers

pytestmark = pytest.mark.slow

SMALL = {"width": 64, "decoder_layers": 2, "decoder_ffn_dim": 96, "num_queries": 12}
FULL = {"width": 256, "decoder_layers": 6, "decoder_ffn_dim": 2048, "num_queries": 100}


def random_maskformer(kind: str, width: int, **decoder) -> nn.Module:
    """A model of `transformers` whose every tensor is random, norms and their statistics included."""
    body = (
        transformers.SwinConfig(out_features=STAGES)
        if kind == "swin_tiny"
        else transformers.ResNetConfig(out_features=STAGES)
    )
    torch.manual_seed(0)
    detr = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=body, d_model=width, **decoder
    )
    config = transformers.MaskFormerConfig(
        backbone_config=body,
        decoder_config=detr,
        fpn_feature_size=width,
        mask_feature_size=width,
        num_labels=7,
    )
    model = transformers.MaskFormerForInstanceSegmentation(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name or name.endswith("proj.bias"):
                parameter.normal_(std=0.3)
            elif "class_predictor" in name or "mask_embedder" in name or "queries_embedder" in name:
                parameter.normal_(std=1.6 / width**0.5)
    return model


@pytest.mark.parametrize("kind", ["resnet50", "swin_tiny"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(SMALL, torch.float32, id="small"),
        # logits of random full-size models are in the hundreds: float32 has not the digits for 1e-4
        pytest.param(FULL, torch.float64, id="full", marks=pytest.mark.slow),
    ],
)
def test_the_final_head_agrees_with_transformers(kind, size, dtype, tmp_path):
    reference = random_maskformer(kind, **size)
    reference.save_pretrained(tmp_path / "hf")
    report = import_weights(tmp_path / "hf", tmp_path / "ours.safetensors")
    assert report.reinitialized == ()
    unused = ("num_batches_tracked", "criterion.empty_weight", "model.layernorm", "position_index")
    assert [name for name in report.left_over if not any(u in name for u in unused)] == []
    ours, config = load_checkpoint(tmp_path / "ours.safetensors")
    assert (config.model.loss.mask_loss, config.model.loss.mask_weight) == ("focal", 20.0)
    ours, reference = ours.to(dtype), reference.to(dtype)
    for shape in ((96, 160), (224, 128)):
        images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 255
        with torch.no_grad():
            (head,) = ours(images).heads
            wanted = reference(normalized(images))
        assert wanted.masks_queries_logits.std() > 0.1
        torch.testing.assert_close(head.class_logits, wanted.class_queries_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(head.mask_logits, wanted.masks_queries_logits, atol=1e-4, rtol=0)
    export_huggingface(tmp_path / "ours.safetensors", tmp_path / "back")
    import_weights(tmp_path / "back", tmp_path / "again.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")[0].state_dict()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in ours.state_dict().items())


def maskformer(**decoder) -> Model:
    settings = {
        "layers": 3,
        "queries": 5,
        "heads": 4,
        "ffn": 24,
        "attention": "cross",
        "features": "stride_32",
        "memory": "backbone",
        "query_features": "zero",
        "order": "self_first",
        "dropout": 0.1,
        **decoder,
    }
    return Model(
        backbone=Backbone(name="resnet18", pretrained=None),
        pixel_decoder=PixelDecoder(kind="fpn", channels=16),
        decoder=Decoder(**settings),
        pilot=Pilot(queries=0),
        loss=Loss(mask_loss="focal", points=None),
    )


def attention(ours, heads):
    """`torch.nn.MultiheadAttention` with the weights of our attention."""
    theirs = nn.MultiheadAttention(ours.out_proj.in_features, heads, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def feed_forward(layer, x):
    return layer.linear2(F.relu(layer.linear1(x)))


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("self_attention", [True, False])
def test_the_decoder_is_detrs(self_attention):
    """Post-norm layers of self-attention, cross-attention and FFN; positions on queries and keys only."""
    torch.manual_seed(0)
    config = maskformer(self_attention=self_attention)
    decoder = QueryDecoder(config, classes=3, backbone_channels=20).double().eval()
    randomize(decoder)
    pixels, feature = torch.randn(2, 16, 12, 20).double(), torch.randn(2, 20, 3, 5).double()
    with torch.no_grad():
        got = decoder(pixels, (feature,)).heads
        memory = decoder.input_proj(feature).flatten(2).transpose(1, 2)
        keys = memory + sine_position(3, 5, 16, memory.device, memory.dtype)
        place = decoder.query_embed.weight.expand(2, -1, -1)
        x = torch.zeros_like(place)
        wanted = []
        for layer in decoder.layers:
            if self_attention:
                talk = attention(layer.self_attn, 4)
                x = layer.self_norm(x + talk(x + place, x + place, x)[0])
            look = attention(layer.cross_attn, 4)
            x = layer.cross_norm(x + look(x + place, keys, memory)[0])
            x = layer.ffn_norm(x + feed_forward(layer, x))
            out = decoder.norm(x)
            masks = torch.einsum("bqc,bchw->bqhw", decoder.mask_embed(out), pixels)
            wanted.append((decoder.class_embed(out), masks))
    assert len(got) == len(wanted) == 3
    for head, (class_logits, mask_logits) in zip(got, wanted):
        torch.testing.assert_close(head.class_logits, class_logits)
        torch.testing.assert_close(head.mask_logits, mask_logits)


def test_the_encoder_is_detrs():
    torch.manual_seed(0)
    encoder = Encoder(maskformer(encoder_layers=2).decoder, 20, 16).double().eval()
    randomize(encoder)
    feature = torch.randn(2, 20, 3, 5).double()
    with torch.no_grad():
        x = encoder.input_proj(feature).flatten(2).transpose(1, 2)
        place = sine_position(3, 5, 16, x.device, x.dtype)
        for layer in encoder.layers:
            x = layer.norm1(x + attention(layer.self_attn, 4)(x + place, x + place, x)[0])
            x = layer.norm2(x + feed_forward(layer, x))
        torch.testing.assert_close(encoder(feature), x.transpose(1, 2).unflatten(2, (3, 5)))


def test_the_encoders_map_feeds_pixel_decoder_and_decoder():
    torch.manual_seed(0)
    model = build_model(maskformer(encoder_layers=1), 3).eval()
    assert model.decoder.input_proj is None  # the encoder has projected already
    images = torch.rand(1, 3, 64, 96) * 255
    seen = {}
    model.encoder.register_forward_hook(lambda _, inputs, out: seen.update(encoded=out))
    model.pixel_decoder.register_forward_pre_hook(lambda _, inputs: seen.update(top=inputs[0][-1]))
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(memories=inputs[1]))
    with torch.no_grad():
        model(images)
    assert seen["top"] is seen["encoded"]
    assert len(seen["memories"]) == 1
    assert seen["memories"][0] is seen["encoded"]


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_official_files_are_read(encoder_layers, tmp_path):
    """A file in the official layout gives the same function; settings come from names and shapes."""
    torch.manual_seed(0)
    config = maskformer(encoder_layers=encoder_layers, heads=8)
    backbone = Backbone(name="resnet50", pretrained=None)
    model = build_model(config.model_copy(update={"backbone": backbone}), 3).eval()
    official = {official_maskformer_names(k)[0]: v for k, v in model.state_dict().items()}
    expected = {
        "backbone.res2.0.conv3.weight",
        "sem_seg_head.pixel_decoder.adapter_1.weight",
        "sem_seg_head.pixel_decoder.adapter_3.norm.bias",
        "sem_seg_head.pixel_decoder.layer_4.weight",
        "sem_seg_head.pixel_decoder.layer_1.norm.weight",
        "sem_seg_head.pixel_decoder.mask_features.weight",
        "sem_seg_head.predictor.transformer.decoder.layers.2.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.transformer.decoder.layers.0.norm3.bias",
        "sem_seg_head.predictor.transformer.decoder.norm.weight",
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.predictor.class_embed.bias",
        "sem_seg_head.predictor.mask_embed.layers.2.weight",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.in_proj_weight"
        if encoder_layers
        else "sem_seg_head.predictor.input_proj.weight",
    }
    assert expected <= set(official)
    # the finest map's names have the smallest numbers
    assert official["sem_seg_head.pixel_decoder.adapter_1.weight"].shape[1] == 256
    assert official["sem_seg_head.pixel_decoder.adapter_3.weight"].shape[1] == 1024
    torch.save({"model": official}, tmp_path / "model.pth")
    report = import_weights(tmp_path / "model.pth", tmp_path / "ours.safetensors")
    assert report.reinitialized == report.left_over == ()
    back, settings = load_checkpoint(tmp_path / "ours.safetensors")
    assert settings.model.decoder == config.decoder
    assert settings.model.pixel_decoder.last_kernel == 3
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        (got,), (wanted,) = back(images).heads, model(images).heads
    assert torch.equal(got.mask_logits, wanted.mask_logits)
    assert torch.equal(got.class_logits, wanted.class_logits)
