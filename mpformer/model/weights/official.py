"""Official Mask2Former, MP-Former and MaskFormer checkpoints (.pkl, .pth): weights, and what they make."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpformer.config.data import TestResize
from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.model.weights.names import Names, official_names
from mpformer.model.weights.names_maskformer import official_maskformer_names
from mpformer.model.weights.prefixes import Unwrapped, unwrap
from mpformer.model.weights.tensorfile import read_tensors, shown
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


_KNOWN = re.compile(r"(?:backbone|sem_seg_head)\.")
"""How the names of an official file begin."""
_CLASS_HEADS = ("class_predictor.bias", "class_predictor.weight", "class_embed.bias", "class_embed.weight")
_LARGEST = 1 << 16
"""Of any size of a model: beyond it a file is damaged."""


@dataclass(frozen=True)
class ForeignModel:
    """What a file of another program holds: tensors by its own names, and the model that they make."""

    unwrapped: Unwrapped
    config: Model
    class_names: tuple[str, ...]
    """In the order of the class head's rows; empty where the file names none."""
    names: Callable[[str], Names | None]
    """Our name of a tensor to theirs."""
    test_resize: TestResize | None = None
    """The size at which it says that it is tested; None where it does not say it, or not in our terms."""
    notes: tuple[str, ...] = ()
    """What else is worth knowing, a line each."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.unwrapped.tensors

    def class_head(self) -> int | None:
        """Rows of the class head, one per class and one for no object; None where there is no class head."""
        for end in _CLASS_HEADS:
            for name, tensor in self.tensors.items():
                if name.endswith(end) and tensor.ndim:
                    return tensor.shape[0]
        return None


def read_official(file: Path) -> ForeignModel:
    """An official checkpoint. Raises `InputError` where it is unreadable or no Mask2Former or MaskFormer.

    Names of early versions are brought up to date; nothing in the file is executed.
    """
    unwrapped = unwrap(read_tensors(file), lambda name: _KNOWN.match(name) is not None, file)
    tensors = {_current_name(name): tensor for name, tensor in unwrapped.tensors.items()}
    unwrapped = replace(unwrapped, tensors=tensors)
    if f"{_MASKFORMER_LAYERS}.0.linear1.weight" in tensors:
        infer, names = _infer_maskformer, official_maskformer_names
    elif f"{_QUERIES}.query_feat.weight" in tensors:
        infer, names = _infer_config, official_names
    else:
        raise InputError(
            f"{file}: no official Mask2Former, MP-Former or MaskFormer checkpoint: "
            f"{_QUERIES}.query_feat.weight is missing, {_what_there_is(tensors)}"
        )
    with settings_found_in(file):
        return ForeignModel(unwrapped, infer(tensors, file), (), names)


def _what_there_is(tensors: dict[str, Tensor]) -> str:
    parts = {
        "backbone": "backbone.",
        "pixel decoder": f"{_PIXELS}.",
        "transformer decoder and heads": _QUERIES,
    }
    counts = {part: sum(n.startswith(start) for n in tensors) for part, start in parts.items()}
    if any(counts.values()):
        return "there is " + ", ".join(f"{part} {count}" for part, count in counts.items()) + " tensors"
    if any(n.startswith(_HUGGING_FACE) for n in tensors):
        return (
            "the names are those of Hugging Face: import the folder that holds the file and its config.json"
        )
    return f"there is {', '.join(shown(name) for name in list(tensors)[:3])}, ..."


_HUGGING_FACE = ("model.pixel_level_module.", "pixel_level_module.")


def _current_name(name: str) -> str:
    if name.startswith(_QUERIES):
        return name.replace("static_query", "query_feat")
    if name.startswith("sem_seg_head.") and not name.startswith(_PIXELS):
        return name.replace("sem_seg_head.", f"{_PIXELS}.", 1)
    return name


def _size(tensors: dict[str, Tensor], file: Path, name: str, dimension: int = 0) -> int:
    if name not in tensors:
        raise InputError(f"{file}: {name} is missing; {_what_there_is(tensors)}")
    shape = tensors[name].shape
    if dimension >= len(shape) or not 0 < shape[dimension] <= _LARGEST:
        raise InputError(f"{file}: {name} has the shape {list(shape)}, which no such tensor has")
    return shape[dimension]


@contextlib.contextmanager
def settings_found_in(file: Path) -> Iterator[None]:
    """Within it, settings that are refused (`ValueError`) are an `InputError` that names the file."""
    try:
        yield
    except ValueError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        reason = lines.split(" [type=")[0].replace("Value error, ", "") or str(error)
        raise InputError(f"{file}: makes no model: {reason}") from None


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
            layers=count(tensors, rf"{re.escape(_MASKFORMER_LAYERS)}\.(\d+)\.", file),
            encoder_layers=count(tensors, encoder_layers, file),
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
    # the released MP-Former has no query positions; a Mask2Former without them is incomplete
    positions = not piloted or f"{_QUERIES}.query_embed.weight" in tensors
    return Model(
        backbone=_infer_backbone(tensors, file),
        pixel_decoder=PixelDecoder(
            layers=count(tensors, rf"{re.escape(encoder)}\.(\d+)\.", file),
            channels=size(f"{_PIXELS}.mask_features.weight", 1),
            heads=_HEADS,
            points=size(f"{encoder}.0.self_attn.attention_weights.weight") // (_HEADS * _LEVELS),
            ffn=size(f"{encoder}.0.linear1.weight"),
        ),
        decoder=Decoder(
            queries=size(f"{_QUERIES}.query_feat.weight"),
            layers=count(tensors, rf"{re.escape(_QUERIES)}\.transformer_ffn_layers\.(\d+)\.", file),
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
        rows = _size(tensors, file, "backbone.layers.0.blocks.0.attn.relative_position_bias_table")
        channels = _size(tensors, file, "backbone.patch_embed.proj.weight")
        blocks = count(tensors, r"backbone\.layers\.2\.blocks\.(\d+)\.", file)
        name = SWINS.get((channels, blocks, (round(rows**0.5) + 1) // 2))
    elif "backbone.stem.conv3.weight" in tensors:
        name = None
    else:
        bottlenecks = "backbone.res2.0.conv3.weight" in tensors
        name = _RESNETS.get((bottlenecks, count(tensors, r"backbone\.res4\.(\d+)\.", file)))
    if name is None:
        raise InputError(
            f"{file}: its backbone is none of {', '.join([*_RESNETS.values(), *SWINS.values()])}"
        )
    return Backbone(name=name, pretrained=None, norm="frozen_bn")


def count(names: Iterable[str], pattern: str, file: Path) -> int:
    """How many layers there are: the numbers, from 0, that the pattern's group takes among the names.

    Raises `InputError` where one is left out.
    """
    found = {match[1] for name in names if (match := re.match(pattern, name))}
    for number in map(str, range(len(found))):
        if number not in found:
            kind = pattern.replace("\\", "").replace("(d+)", number)
            raise InputError(f"{file}: the tensors {kind}* are missing, though there are later ones")
    return len(found)
