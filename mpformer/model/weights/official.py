"""Official Mask2Former, MP-Former and MaskFormer checkpoints (.pkl, .pth): weights, and what they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.weights.names import Names, official_names
from mpformer.model.weights.names_maskformer import official_maskformer_names
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import MEMORY_STRIDES, InputError

_PIXELS = "sem_seg_head.pixel_decoder"
_QUERIES = "sem_seg_head.predictor"
_MASKFORMER_LAYERS = f"{_QUERIES}.transformer.decoder.layers"
_HEADS = 8
"""Attention heads of all official models; no tensor shows their number."""
_LEVELS = len(MEMORY_STRIDES)

_RESNETS = {(True, 6): "resnet50", (True, 23): "resnet101", (True, 36): "resnet152"}
"""By (bottleneck blocks, blocks of the third stage)."""

SWINS = {
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (192, 18, 12): "swin_large_patch4_window12_384",
}
"""timm's names by (embedding channels, blocks of the third stage, window)."""


@dataclass(frozen=True)
class ForeignModel:
    """What a file of another program holds: tensors by its own names, and the model that they make."""

    tensors: dict[str, Tensor]
    config: Model
    class_names: tuple[str, ...]
    names: Callable[[str], Names | None]
    """Our name of a tensor to theirs."""


def read_official(file: Path) -> ForeignModel:
    """An official checkpoint. Raises `InputError` where it is unreadable or no Mask2Former or MaskFormer.

    Names of early versions are brought up to date; nothing in the file is executed.
    """
    tensors = {_current_name(name): tensor for name, tensor in read_tensors(file).items()}
    if f"{_MASKFORMER_LAYERS}.0.linear1.weight" in tensors:
        return ForeignModel(tensors, _infer_maskformer(tensors, file), (), official_maskformer_names)
    if f"{_QUERIES}.query_feat.weight" not in tensors:
        raise InputError(
            f"{file}: no official Mask2Former, MP-Former or MaskFormer checkpoint: "
            f"{_QUERIES}.query_feat.weight is missing, there is {', '.join(list(tensors)[:3])}, ..."
        )
    return ForeignModel(tensors, _infer_config(tensors, file), (), official_names)


def _current_name(name: str) -> str:
    if name.startswith(_QUERIES):
        return name.replace("static_query", "query_feat")
    if name.startswith("sem_seg_head.") and not name.startswith(_PIXELS):
        return name.replace("sem_seg_head.", f"{_PIXELS}.", 1)
    return name


def _size(tensors: dict[str, Tensor], file: Path, name: str, dimension: int = 0) -> int:
    if name not in tensors:
        raise InputError(f"{file}: {name} is missing")
    return tensors[name].shape[dimension]


def maskformer_decoder(**sizes: Any) -> Decoder:
    """The settings of MaskFormer's decoder beside its sizes."""
    return Decoder(
        attention="cross",
        features="stride_32",
        memory="backbone",
        query_features="zero",
        order="self_first",
        **sizes,
    )


def _infer_maskformer(tensors: dict[str, Tensor], file: Path) -> Model:
    def size(name: str, dimension: int = 0) -> int:
        return _size(tensors, file, name, dimension)

    encoder_layers = rf"{re.escape(_PIXELS)}\.transformer\.encoder\.layers\.(\d+)\."
    return Model(
        backbone=_infer_backbone(tensors, file),
        pixel_decoder=PixelDecoder(
            kind="fpn",
            channels=size(f"{_PIXELS}.mask_features.weight", 1),
            last_kernel=1 if size(f"{_PIXELS}.mask_features.weight", 2) == 1 else 3,
        ),
        decoder=maskformer_decoder(
            queries=size(f"{_QUERIES}.query_embed.weight"),
            layers=count(tensors, rf"{re.escape(_MASKFORMER_LAYERS)}\.(\d+)\."),
            encoder_layers=count(tensors, encoder_layers),
            heads=_HEADS,
            ffn=size(f"{_MASKFORMER_LAYERS}.0.linear1.weight"),
            dropout=0.1,
        ),
        pilot=Pilot(queries=0),
        loss=Loss(class_weight=1.0, mask_weight=20.0, dice_weight=1.0, mask_loss="focal", points=None),
    )


def _infer_config(tensors: dict[str, Tensor], file: Path) -> Model:
    def size(name: str, dimension: int = 0) -> int:
        return _size(tensors, file, name, dimension)

    encoder = f"{_PIXELS}.transformer.encoder.layers"
    piloted = f"{_QUERIES}.label_enc.weight" in tensors
    # the released MP-Former has no query positions
    positions = f"{_QUERIES}.query_embed.weight" in tensors
    return Model(
        backbone=_infer_backbone(tensors, file),
        pixel_decoder=PixelDecoder(
            layers=count(tensors, rf"{re.escape(encoder)}\.(\d+)\."),
            channels=size(f"{_PIXELS}.mask_features.weight", 1),
            heads=_HEADS,
            points=size(f"{encoder}.0.self_attn.attention_weights.weight") // (_HEADS * _LEVELS),
            ffn=size(f"{encoder}.0.linear1.weight"),
        ),
        decoder=Decoder(
            queries=size(f"{_QUERIES}.query_feat.weight"),
            layers=count(tensors, rf"{re.escape(_QUERIES)}\.transformer_ffn_layers\.(\d+)\."),
            heads=_HEADS,
            ffn=size(f"{_QUERIES}.transformer_ffn_layers.0.linear1.weight"),
        ),
        pilot=Pilot(
            queries=100 if piloted else 0,
            flavour="paper" if positions else "released",
            query_positions=positions,
        ),
    )


def _infer_backbone(tensors: dict[str, Tensor], file: Path) -> Backbone:
    if "backbone.patch_embed.proj.weight" in tensors:
        # a table has (2 * window - 1) squared rows
        table = tensors["backbone.layers.0.blocks.0.attn.relative_position_bias_table"]
        channels = tensors["backbone.patch_embed.proj.weight"].shape[0]
        blocks = count(tensors, r"backbone\.layers\.2\.blocks\.(\d+)\.")
        name = SWINS.get((channels, blocks, window_of(table)))
    elif "backbone.stem.conv3.weight" in tensors:
        name = None
    else:
        bottlenecks = "backbone.res2.0.conv3.weight" in tensors
        name = _RESNETS.get((bottlenecks, count(tensors, r"backbone\.res4\.(\d+)\.")))
    if name is None:
        raise InputError(
            f"{file}: its backbone is none of {', '.join([*_RESNETS.values(), *SWINS.values()])}"
        )
    return Backbone(name=name, pretrained=None, norm="frozen_bn")


def window_of(table: Tensor) -> int:
    """The window of a Swin whose relative-position table [(2w-1)^2,heads] this is."""
    return (round(table.shape[0] ** 0.5) + 1) // 2


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group takes among the names."""
    numbers = (re.match(pattern, name) for name in names)
    return max((int(m.group(1)) for m in numbers if m), default=-1) + 1
