"""What `transformers`' Mask2Former and MaskFormer can hold of ours, and their config.json of it.

Both take a backbone of `transformers`' own classes (ResNets with batch norm, whose statistics are stored
whether they are frozen or live; Swin) or, through its wrapper, one of timm. They cannot hold batch norm that
was replaced by GroupNorm (but in ResNet-50, which timm has with it), plain vision transformers with a
pyramid, norms on the maps of others than Swin, other pixel decoders and attentions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpformer.config.model import Backbone, Decoder, Model, Pilot
from mpformer.model.segmenter import Segmenter
from mpformer.model.weights.huggingface import RESNETS, STAGES, WITH_GROUP_NORM
from mpformer.model.weights.names import HUGGING_FACE_ENCODER, Names, huggingface_names, with_timm_backbone
from mpformer.model.weights.names_maskformer import huggingface_maskformer_names
from mpformer.model.weights.official import SWINS, maskformer_decoder

_GROUPS = 32
"""Of the group norms in both pixel decoders."""
_TOLD_BY_TENSORS = {"queries", "layers", "heads", "ffn", "dropout"}
"""Settings of the decoder that both forms have."""


@dataclass(frozen=True)
class Form:
    """One of the two models of `transformers`."""

    title: str
    names: Callable[[str], Names | None]
    """The names of a tensor of ours, but for a backbone of timm's; None for what it lacks."""
    refusal: Callable[[Segmenter], str | None]
    """The first setting by which a model computes something else, whatever its tensors; None: it fits."""
    settings: Callable[[Segmenter], dict[str, Any]]
    """The content of config.json."""
    unused: Callable[[Segmenter], dict[str, Tensor]]
    """Tensors that it expects beside those that decide its output, statistics' counts aside."""

    def names_of(self, model: Segmenter) -> Callable[[str], Names | None]:
        """As `names`, with the names of the model's backbone."""
        return with_timm_backbone(self.names) if _is_wrapped(model.config.backbone) else self.names


def form_of(model: Segmenter) -> Form:
    """The form that is nearest to a model."""
    return MASKFORMER if model.config.decoder.memory == "backbone" else MASK2FORMER


# --- backbones --------------------------------------------------------------------------------------


def _is_wrapped(backbone: Backbone) -> bool:
    """Whether `transformers` takes the backbone from timm, under timm's names."""
    is_resnet = backbone.name in RESNETS.values() and backbone.norm != "group_norm"
    return not is_resnet and backbone.name not in SWINS.values()


def _has_group_norm(model: Segmenter) -> bool:
    """Whether batch norm has been replaced in the backbone; other norms never are."""
    replaced = any(isinstance(module, nn.GroupNorm) for module in model.backbone.body.modules())
    return replaced and model.config.backbone.norm == "group_norm"


def _no_backbone(model: Segmenter) -> str | None:
    backbone = model.config.backbone
    name, is_swin = backbone.name, backbone.name in SWINS.values()
    if backbone.output_norms not in (None, is_swin):
        return f"backbone.output_norms is {backbone.output_norms}: Swin has them there, others have not"
    if not _is_wrapped(backbone):
        return None
    if _has_group_norm(model) and name not in WITH_GROUP_NORM:
        return (
            f"backbone.norm is group_norm: it takes {name} with batch norm (frozen_bn or bn), GroupNorm in "
            f"{', '.join(WITH_GROUP_NORM)} alone"
        )
    if not model.backbone.is_plain:
        return f"backbone.name is {name}, whose maps it does not take as they are here"
    return None


def _backbone_settings(model: Segmenter) -> dict[str, Any]:
    backbone = model.config.backbone
    if _is_wrapped(backbone):
        return {
            "model_type": "timm_backbone",
            "backbone": WITH_GROUP_NORM[backbone.name] if _has_group_norm(model) else backbone.name,
            "out_indices": list(model.backbone.stages),
            "freeze_batch_norm_2d": backbone.norm == "frozen_bn",
        }
    swins = {name: key for key, name in SWINS.items()}
    if backbone.name in swins:
        embed_dim, blocks, window = swins[backbone.name]
        return {
            "model_type": "swin",
            "embed_dim": embed_dim,
            "depths": [2, 2, blocks, 2],
            "num_heads": [embed_dim // 32 * 2**i for i in range(4)],
            "window_size": window,
            "image_size": 384 if window == 12 else 224,
            "out_features": STAGES,
        }
    layer_type, depths = {name: key for key, name in RESNETS.items()}[backbone.name]
    widest = 4 if layer_type == "bottleneck" else 1
    return {
        "model_type": "resnet",
        "layer_type": layer_type,
        "depths": list(depths),
        "hidden_sizes": [64 * widest * 2**i for i in range(4)],
        "out_features": STAGES,
    }


# --- what both share --------------------------------------------------------------------------------


def _differs(model: Segmenter, usual: Decoder) -> str | None:
    config, plain = model.config, Model(pilot=Pilot(queries=0))
    if reason := _no_backbone(model):
        return reason
    for name in ("output", "architecture"):
        if getattr(config, name) != getattr(plain, name):
            return f"{name} is {getattr(config, name)}"
    if config.pixel_decoder.channels % _GROUPS:
        return f"pixel_decoder.channels is {config.pixel_decoder.channels}: {_GROUPS} is to divide it"
    for name, value in config.decoder.model_dump(exclude=_TOLD_BY_TENSORS).items():
        if value != getattr(usual, name):
            return f"decoder.{name} is {value}"
    for name in ("assignment", "match_by"):
        if getattr(config.loss, name) != getattr(plain.loss, name):
            return f"loss.{name} is {getattr(config.loss, name)}"
    return None


def _class_settings(model: Segmenter) -> dict[str, Any]:
    names = model.classes.names
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _class_weights(model: Segmenter) -> dict[str, Tensor]:
    weights = torch.ones(len(model.classes) + 1)
    weights[-1] = model.config.loss.no_object_weight
    return {"criterion.empty_weight": weights}


def _is_swin(model: Segmenter) -> bool:
    return model.config.backbone.name in SWINS.values()


# --- Mask2Former ------------------------------------------------------------------------------------


def _no_mask2former(model: Segmenter) -> str | None:
    pixel, usual = model.config.pixel_decoder, Model(pilot=Pilot(queries=0))
    if pixel.kind != usual.pixel_decoder.kind:
        return f"pixel_decoder.kind is {pixel.kind}"
    if pixel.last_kernel == 3:
        return "pixel_decoder.last_kernel is 3"
    if pixel.heads != model.config.decoder.heads or pixel.points != usual.pixel_decoder.points:
        return "it has equal heads in both decoders, and 4 points"
    return _differs(model, usual.decoder)


def _mask2former_settings(model: Segmenter) -> dict[str, Any]:
    config = model.config
    pixel, decoder, loss = config.pixel_decoder, config.decoder, config.loss
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _backbone_settings(model),
        "feature_size": pixel.channels,
        "mask_feature_size": pixel.channels,
        "hidden_dim": pixel.channels,
        "encoder_layers": pixel.layers,
        "encoder_feedforward_dim": pixel.ffn,
        "num_attention_heads": decoder.heads,
        "num_queries": decoder.queries,
        "decoder_layers": decoder.layers + 1,
        "dim_feedforward": decoder.ffn,
        "dropout": decoder.dropout,
        "pre_norm": False,
        "enforce_input_projection": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
        "class_weight": loss.class_weight,
        "mask_weight": loss.mask_weight,
        "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight,
        "train_num_points": loss.points or 12544,
        "oversample_ratio": loss.oversample,
        "importance_sample_ratio": loss.importance,
        **_class_settings(model),
    }


def _unused_by_mask2former(model: Segmenter) -> dict[str, Tensor]:
    extra = _class_weights(model)
    if model.decoder.query_embed is None:
        # positions of zero are no positions
        size = (model.config.decoder.queries, model.config.pixel_decoder.channels)
        extra["model.transformer_module.queries_embedder.weight"] = torch.zeros(size)
    if _is_swin(model):
        channels = model.backbone.channels[-1]
        extra[f"{HUGGING_FACE_ENCODER}.swin.layernorm.weight"] = torch.ones(channels)
        extra[f"{HUGGING_FACE_ENCODER}.swin.layernorm.bias"] = torch.zeros(channels)
    return extra


# --- MaskFormer -------------------------------------------------------------------------------------


def _no_maskformer(model: Segmenter) -> str | None:
    pixel = model.config.pixel_decoder
    if pixel.kind != "fpn":
        return f"pixel_decoder.kind is {pixel.kind}"
    if pixel.last_kernel == 1:
        return "pixel_decoder.last_kernel is 1"
    if model.backbone.channels[-1] == pixel.channels:
        return f"its backbone's last map has {pixel.channels} channels, as the decoder has"
    return _differs(model, maskformer_decoder())


def _maskformer_settings(model: Segmenter) -> dict[str, Any]:
    config = model.config
    decoder, channels, loss = config.decoder, config.pixel_decoder.channels, config.loss
    backbone = _backbone_settings(model)
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": backbone,
        "decoder_config": {
            "model_type": "detr",
            "use_timm_backbone": False,
            "backbone_config": backbone,
            "d_model": channels,
            "num_queries": decoder.queries,
            "decoder_layers": decoder.layers,
            "decoder_ffn_dim": decoder.ffn,
            "decoder_attention_heads": decoder.heads,
            "encoder_attention_heads": decoder.heads,
            "dropout": decoder.dropout,
            "activation_function": "relu",
        },
        "fpn_feature_size": channels,
        "mask_feature_size": channels,
        "cross_entropy_weight": loss.class_weight,
        "mask_weight": loss.mask_weight,
        "dice_weight": loss.dice_weight,
        "no_object_weight": loss.no_object_weight,
        **_class_settings(model),
    }


def _unused_by_maskformer(model: Segmenter) -> dict[str, Tensor]:
    extra = _class_weights(model)
    if _is_swin(model):
        channels = model.backbone.channels[-1]
        extra[f"{HUGGING_FACE_ENCODER}.model.layernorm.weight"] = torch.ones(channels)
        extra[f"{HUGGING_FACE_ENCODER}.model.layernorm.bias"] = torch.zeros(channels)
        for name, module in model.named_modules():
            if isinstance(index := getattr(module, "relative_position_index", None), Tensor):
                [table] = huggingface_maskformer_names(f"{name}.relative_position_bias_table") or ("",)
                extra[table.replace("bias_table", "index")] = index
    return extra


MASK2FORMER = Form(
    "Mask2Former", huggingface_names, _no_mask2former, _mask2former_settings, _unused_by_mask2former
)
MASKFORMER = Form(
    "MaskFormer", huggingface_maskformer_names, _no_maskformer, _maskformer_settings, _unused_by_maskformer
)
