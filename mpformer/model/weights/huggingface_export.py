"""Our Mask2Former written as a Hugging Face folder, where `transformers` has an equal of it.

What the form can hold: ResNets with batch norm, whose statistics it stores whether they are frozen or live
(read back, they are frozen), Swin, deformable pixel decoder, masked attention. What it cannot: GroupNorm in
the backbone, other backbones, pixel decoders and attentions; pilot embeddings are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpformer import atomic
from mpformer.config.data import TestResize
from mpformer.config.model import Backbone, Model, Pilot
from mpformer.model.architecture import Architecture
from mpformer.model.segmenter import Segmenter
from mpformer.model.weights.huggingface import RESNETS, STAGES
from mpformer.model.weights.names import HUGGING_FACE_ENCODER, huggingface_names
from mpformer.model.weights.official import SWINS
from mpformer.types import PIXEL_MEAN, PIXEL_STD, InputError, RunError

_NO_LIMIT = 1 << 20
"""Pixels; where `transformers` must be given a size."""


def write_huggingface(model: Architecture, folder: Path, resize: TestResize) -> None:
    """Write config.json, preprocessor_config.json (with the model's `resize` for evaluation) and
    model.safetensors.

    Pilot embeddings are left out: inference does not use them. Raises `InputError` for a model that
    `transformers` has no equal of.
    """
    if not isinstance(model, Segmenter):
        raise InputError(f"export: transformers' Mask2Former cannot hold a {type(model).__name__}")
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.pilot_embed")}
    unknown = next((f"it has no {k}" for k in own if huggingface_names(k) is None), None)
    if reason := _no_mask2former(model.config) or unknown:
        raise InputError(f"export: transformers' Mask2Former cannot hold this model: {reason}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        names = huggingface_names(name) or ()
        parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)  # a number alone has no chunks
        tensors.update(zip(names, parts))
    tensors = _unused_tensors(model, tensors) | tensors
    texts = {
        "config": _to_settings(model),
        "preprocessor_config": _to_preprocessor(model.config.backbone, resize),
    }
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file: the name of a folder to write is expected")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(folder / "model.safetensors") as partial:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
        for name, content in texts.items():
            atomic.write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder}: the export cannot be written: {reason}") from error


def _no_mask2former(config: Model) -> str | None:
    """The first setting by which a model computes something else than Mask2Former, whatever its tensors."""
    usual = Model(pilot=Pilot(queries=0))
    backbone, pixel = config.backbone, config.pixel_decoder
    is_resnet, is_swin = backbone.name in RESNETS.values(), backbone.name in SWINS.values()
    if not (is_resnet or is_swin):
        return f"backbone.name is {backbone.name}: it has {', '.join([*RESNETS.values(), *SWINS.values()])}"
    if backbone.norm == "group_norm" and is_resnet:
        return "backbone.norm is group_norm: its ResNets have batch norm"
    if backbone.output_norms not in (None, is_swin):
        return f"backbone.output_norms is {backbone.output_norms}: Swin has them there, ResNets have not"
    for name in ("output", "architecture"):
        if getattr(config, name) != getattr(usual, name):
            return f"{name} is {getattr(config, name)}"
    if pixel.kind != usual.pixel_decoder.kind:
        return f"pixel_decoder.kind is {pixel.kind}"
    if pixel.last_kernel == 3:
        return "pixel_decoder.last_kernel is 3"
    if pixel.heads != config.decoder.heads or pixel.points != usual.pixel_decoder.points:
        return "it has equal heads in both decoders, and 4 points"
    told_by_tensors = {"queries", "layers", "heads", "ffn", "dropout"}
    for name, value in config.decoder.model_dump(exclude=told_by_tensors).items():
        if value != getattr(usual.decoder, name):
            return f"decoder.{name} is {value}"
    for name in ("assignment", "match_by"):
        if getattr(config.loss, name) != getattr(usual.loss, name):
            return f"loss.{name} is {getattr(config.loss, name)}"
    return None


def _unused_tensors(model: Segmenter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `transformers` expects in the file beside the tensors that decide its output."""
    config, classes = model.config, len(model.classes)
    weights = torch.ones(classes + 1)
    weights[-1] = config.loss.no_object_weight
    extra = {"criterion.empty_weight": weights}
    if model.decoder.query_embed is None:
        # positions of zero are no positions
        size = (config.decoder.queries, config.pixel_decoder.channels)
        extra["model.transformer_module.queries_embedder.weight"] = torch.zeros(size)
    if config.backbone.name.startswith("swin_"):
        channels = model.backbone.channels[-1]
        extra[f"{HUGGING_FACE_ENCODER}.swin.layernorm.weight"] = torch.ones(channels)
        extra[f"{HUGGING_FACE_ENCODER}.swin.layernorm.bias"] = torch.zeros(channels)
    for name in tensors:
        if name.endswith("running_mean"):
            extra[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return extra


def _to_settings(model: Segmenter) -> dict[str, Any]:
    config = model.config
    pixel, decoder, loss = config.pixel_decoder, config.decoder, config.loss
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _to_backbone_settings(config.backbone.name),
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
        "id2label": {str(i): name for i, name in enumerate(model.classes.names)},
        "label2id": {name: i for i, name in enumerate(model.classes.names)},
    }


def _to_backbone_settings(name: str) -> dict[str, Any]:
    for (embed_dim, blocks, window), swin in SWINS.items():
        if swin == name:
            return {
                "model_type": "swin",
                "embed_dim": embed_dim,
                "depths": [2, 2, blocks, 2],
                "num_heads": [embed_dim // 32 * 2**i for i in range(4)],
                "window_size": window,
                "image_size": 384 if window == 12 else 224,
                "out_features": STAGES,
            }
    for (layer_type, depths), resnet in RESNETS.items():
        if resnet == name:
            widest = 4 if layer_type == "bottleneck" else 1
            return {
                "model_type": "resnet",
                "layer_type": layer_type,
                "depths": list(depths),
                "hidden_sizes": [64 * widest * 2**i for i in range(4)],
                "out_features": STAGES,
            }
    raise InputError(f"export: transformers' Mask2Former has no backbone {name}")


def _to_preprocessor(backbone: Backbone, resize: TestResize) -> dict[str, Any]:
    if resize.short is not None:
        size = {"shortest_edge": resize.short, "longest_edge": resize.long or _NO_LIMIT}
    else:
        size = {"max_height": resize.long or _NO_LIMIT, "max_width": resize.long or _NO_LIMIT}
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": resize.short is not None or resize.long is not None,
        "size": size,
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in backbone.mean or PIXEL_MEAN],
        "image_std": [std / 255 for std in backbone.std or PIXEL_STD],
    }
