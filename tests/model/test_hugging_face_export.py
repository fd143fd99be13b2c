"""Exported folders as `transformers` reads them: for one image they predict what our model predicts."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from mpformer.config import data as config_data
from mpformer.config.model import Backbone, Loss, Model, Pilot, PixelDecoder
from mpformer.model.architecture import build_model
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.loading import import_weights, load_checkpoint
from mpformer.model.weights.official import maskformer_decoder
from mpformer.types import InputError
from tests.model.hugging_face import transformers
from tests.model.samples import tiny_model

pytestmark = pytest.mark.slow


def mask2former(name: str, norm: str, **backbone) -> Model:
    base = tiny_model()
    return base.model_copy(
        update={
            "backbone": Backbone(name=name, pretrained=None, norm=norm, **backbone),
            "pixel_decoder": PixelDecoder(channels=32, layers=1, heads=2, ffn=16),
        }
    )


def maskformer(name: str, norm: str) -> Model:
    return Model(
        backbone=Backbone(name=name, pretrained=None, norm=norm),
        pixel_decoder=PixelDecoder(kind="fpn", channels=32, heads=2),
        decoder=maskformer_decoder(queries=7, layers=2, heads=2, ffn=16, dropout=0.1),
        pilot=Pilot(queries=0),
        loss=Loss(mask_loss="focal", points=None),
    )


def random_model(config: Model) -> nn.Module:
    """Every statistic and offset is random."""
    torch.manual_seed(0)
    model = build_model(config, 3).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0)
            elif "running_mean" in name or "sampling_offsets" in name or "attention_weights" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "mask_embed" in name or "class_embed" in name or "query_" in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


@pytest.mark.parametrize(
    ("config", "backbone"),
    [
        (mask2former("resnet18", "bn"), "resnet"),
        (mask2former("resnet18", "frozen_bn"), "resnet"),
        (mask2former("resnet50", "group_norm"), "timm_backbone"),
        (mask2former("tf_efficientnet_lite0", "bn"), "timm_backbone"),
        (mask2former("tf_efficientnet_lite0", "frozen_bn"), "timm_backbone"),
        (mask2former("regnetx_002", "frozen_bn"), "timm_backbone"),
        (mask2former("convnext_atto", "bn"), "timm_backbone"),
        (maskformer("resnet18", "frozen_bn"), "resnet"),
        (maskformer("swin_tiny_patch4_window7_224", "frozen_bn"), "swin"),
        (maskformer("regnetx_002", "bn"), "timm_backbone"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.backbone.name} {value.backbone.norm}",
)
def test_the_folder_predicts_what_the_model_predicts(config, backbone, tmp_path):
    model = random_model(config)
    write_huggingface(model, tmp_path, config_data.TestResize())
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["backbone_config"]["model_type"] == backbone
    kind, of = {
        "mask2former": ("Mask2Former", "UniversalSegmentation"),
        "maskformer": ("MaskFormer", "InstanceSegmentation"),
    }[settings["model_type"]]
    back, info = getattr(transformers, f"{kind}For{of}").from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    given = processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(image).permute(2, 0, 1)[None]).heads[-1]
        found = back.eval()(given)
    assert wanted.mask_logits.std() > 0.01
    for ours, theirs in (
        (wanted.class_logits, found.class_queries_logits),
        (wanted.mask_logits, found.masks_queries_logits),
    ):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))

    import_weights(tmp_path, tmp_path / "back.safetensors")
    returned, _ = load_checkpoint(tmp_path / "back.safetensors")
    with torch.no_grad():
        again = returned.eval()(torch.from_numpy(image).permute(2, 0, 1)[None]).heads[-1]
    torch.testing.assert_close(again.mask_logits, wanted.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.class_logits, wanted.class_logits, rtol=1e-4, atol=1e-4)


NARROW = tiny_model().model_copy(update={"backbone": Backbone(name="resnet18", pretrained=None)})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            mask2former("regnetx_002", "group_norm"),
            r"backbone\.norm is group_norm: it takes regnetx_002 with",
        ),
        (mask2former("vit_tiny_patch16_224", "bn"), r"backbone\.name is vit_tiny_patch16_224, whose maps"),
        (
            tiny_model().model_copy(update={"backbone": Backbone(name="resnet18", pretrained=None)}),
            r"pixel_decoder\.channels is 16",
        ),
    ],
)
def test_what_transformers_has_no_equal_of_is_one_line_that_names_what_works(config, reason, tmp_path):
    with pytest.raises(InputError, match=reason) as error:
        write_huggingface(build_model(config, 2), tmp_path / "out", config_data.TestResize())
    assert "`mpformer export CHECKPOINT OUT.onnx`" in str(error.value)
    assert not (tmp_path / "out").exists()
