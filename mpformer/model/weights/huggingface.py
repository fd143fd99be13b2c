"""Hugging Face folders of Mask2Former and MaskFormer read into our model, and Mask2Former's written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpformer.config.data import TestResize
from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.architecture import Architecture
from mpformer.model.segmenter import Segmenter
from mpformer.model.weights.names import huggingface_names
from mpformer.model.weights.names_maskformer import huggingface_maskformer_names
from mpformer.model.weights.official import SWINS, ForeignModel, maskformer_decoder
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import PIXEL_MEAN, PIXEL_STD, InputError

_ENCODER = "model.pixel_level_module.encoder"
_STAGES = [f"stage{i}" for i in range(1, 5)]
_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def read_huggingface(folder: Path) -> ForeignModel:
    """A folder with config.json and weights (safetensors or .bin, in one file or in shards).

    Raises `InputError` where the folder is incomplete or holds another kind of model.
    """
    settings = _read_json(folder / "config.json")
    kinds = {
        "mask2former": (_to_config, huggingface_names),
        "maskformer": (_to_maskformer, huggingface_maskformer_names),
    }
    if settings.get("model_type") not in kinds:
        raise InputError(
            f"{folder / 'config.json'}: model_type 'mask2former' or 'maskformer' is expected, not "
            f"{settings.get('model_type')!r}"
        )
    to_config, names_of = kinds[settings["model_type"]]
    names = settings.get("id2label") or {}
    class_names = tuple(names[key] for key in sorted(names, key=int))
    try:
        config = to_config(settings, folder)
    except KeyError as error:
        raise InputError(f"{folder / 'config.json'}: the setting {error} is missing") from None
    return ForeignModel(_read_weights(folder), config, class_names, names_of)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent}: no Hugging Face folder: {file.name} is missing") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return read_tensors(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            return {k: v for shard in shards for k, v in read_tensors(folder / Path(shard).name).items()}
    raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def _to_config(settings: dict[str, Any], folder: Path) -> Model:
    if settings.get("pre_norm"):
        raise InputError(f"{folder / 'config.json'}: pre_norm is not supported")
    return Model(
        backbone=_to_backbone(settings["backbone_config"], folder),
        pixel_decoder=PixelDecoder(
            layers=settings["encoder_layers"],
            channels=settings["feature_size"],
            heads=settings["num_attention_heads"],
            ffn=settings["encoder_feedforward_dim"],
        ),
        decoder=Decoder(
            queries=settings["num_queries"],
            layers=settings["decoder_layers"] - 1,
            heads=settings["num_attention_heads"],
            ffn=settings["dim_feedforward"],
            dropout=settings["dropout"],
        ),
        pilot=Pilot(queries=0),
        loss=Loss(
            class_weight=settings["class_weight"],
            mask_weight=settings["mask_weight"],
            dice_weight=settings["dice_weight"],
            no_object_weight=settings["no_object_weight"],
            points=settings["train_num_points"],
            oversample=settings["oversample_ratio"],
            importance=settings["importance_sample_ratio"],
        ),
    )


def _to_maskformer(settings: dict[str, Any], folder: Path) -> Model:
    decoder = settings["decoder_config"]
    return Model(
        backbone=_to_backbone(settings["backbone_config"], folder),
        pixel_decoder=PixelDecoder(kind="fpn", channels=settings["fpn_feature_size"], last_kernel=3),
        decoder=maskformer_decoder(
            queries=decoder["num_queries"],
            layers=decoder["decoder_layers"],
            heads=decoder["decoder_attention_heads"],
            ffn=decoder["decoder_ffn_dim"],
            dropout=decoder["dropout"],
        ),
        pilot=Pilot(queries=0),
        loss=Loss(
            class_weight=settings["cross_entropy_weight"],
            mask_weight=settings["mask_weight"],
            dice_weight=settings["dice_weight"],
            no_object_weight=settings["no_object_weight"],
            mask_loss="focal",
            points=None,
        ),
    )


def _to_backbone(settings: dict[str, Any], folder: Path) -> Backbone:
    kind = settings.get("model_type")
    depths = tuple(settings.get("depths", ()))
    name = None
    if kind in ("swin", "maskformer-swin") and depths[:2] == (2, 2):
        name = SWINS.get((settings["embed_dim"], depths[2], settings["window_size"]))
    elif kind == "resnet":
        name = _RESNETS.get((settings["layer_type"], depths))
    if name is None:
        raise InputError(
            f"{folder / 'config.json'}: backbone {kind} {list(depths)} is none of "
            f"{', '.join([*_RESNETS.values(), *SWINS.values()])}"
        )
    return Backbone(name=name, pretrained=None)


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
    own = model.state_dict()
    unknown = [k for k in own if not k.startswith("decoder.pilot_embed") and huggingface_names(k) is None]
    reason = f"it has no {unknown[0]}" if unknown else _no_mask2former(model.config)
    if reason:
        raise InputError(f"export: transformers' Mask2Former cannot hold this model: {reason}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        names = huggingface_names(name)
        if names is not None:
            tensors.update(zip(names, (part.contiguous() for part in tensor.chunk(len(names)))))
    tensors.update(_unused_tensors(model, tensors))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    for name, content in (("config", _to_settings(model)), ("preprocessor_config", _to_preprocessor(resize))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _no_mask2former(config: Model) -> str | None:
    """The first setting by which a model computes something else than Mask2Former, whatever its tensors."""
    usual = Model(pilot=Pilot(queries=0))
    told_by_tensors = {"queries", "layers", "heads", "ffn", "dropout"}
    for name, value in config.decoder.model_dump(exclude=told_by_tensors).items():
        if value != getattr(usual.decoder, name):
            return f"decoder.{name} is {value}"
    if config.backbone.norm == "group_norm" and config.backbone.name in _RESNETS.values():
        return "backbone.norm is group_norm: its ResNets have batch norm"
    if config.pixel_decoder.last_kernel == 3:
        return "pixel_decoder.last_kernel is 3"
    if config.loss.assignment == "fixed":
        return "loss.assignment is fixed"
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
        extra[f"{_ENCODER}.swin.layernorm.weight"] = torch.ones(channels)
        extra[f"{_ENCODER}.swin.layernorm.bias"] = torch.zeros(channels)
    for name in tensors:
        if name.endswith("running_mean"):
            extra[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return extra


def _to_settings(model: Segmenter) -> dict[str, Any]:
    config = model.config
    pixel, decoder, loss = config.pixel_decoder, config.decoder, config.loss
    if pixel.heads != decoder.heads or pixel.points != 4:
        raise InputError("export: transformers' Mask2Former has equal heads in both decoders, and 4 points")
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
                "out_features": _STAGES,
            }
    for (layer_type, depths), resnet in _RESNETS.items():
        if resnet == name:
            widest = 4 if layer_type == "bottleneck" else 1
            return {
                "model_type": "resnet",
                "layer_type": layer_type,
                "depths": list(depths),
                "hidden_sizes": [64 * widest * 2**i for i in range(4)],
                "out_features": _STAGES,
            }
    raise InputError(f"export: transformers' Mask2Former has no backbone {name}")


def _to_preprocessor(resize: TestResize) -> dict[str, Any]:
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
        "image_mean": [m / 255 for m in PIXEL_MEAN],
        "image_std": [s / 255 for s in PIXEL_STD],
    }
