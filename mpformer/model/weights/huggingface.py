"""Hugging Face folders of Mask2Former and MaskFormer read into our model.

Every setting of config.json that the model depends on is checked for its type and range, and layers are
counted in the weights, before a model is made of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpformer.config.data import TestResize
from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.config.yamlfile import nearest
from mpformer.model.weights.filekind import check_text
from mpformer.model.weights.names import Names, huggingface_names, with_timm_backbone
from mpformer.model.weights.names_in_memory import name_in_files
from mpformer.model.weights.names_maskformer import huggingface_maskformer_names
from mpformer.model.weights.official import (
    SWINS,
    ForeignModel,
    count,
    maskformer_decoder,
    settings_found_in,
)
from mpformer.model.weights.prefixes import Unwrapped, unwrap
from mpformer.model.weights.tensorfile import read_tensors, shown
from mpformer.types import InputError

STAGES = [f"stage{i}" for i in range(1, 5)]
RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
"""timm's names by (blocks, depths)."""
WITH_GROUP_NORM = {"resnet50": "resnet50_gn"}
"""timm's models with GroupNorm of 32 groups, by the name of the same with batch norm."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LARGEST = 1 << 16
"""Of any size of a model: beyond it a config.json is damaged."""
_BEYOND = 1e12
"""Of any other number."""
_LONGEST_SIDE = 1 << 14
"""Pixels of the shorter side that images are resized to: beyond it a preprocessor_config.json is damaged."""
_BASE = re.compile(r"(?:pixel_level_module|transformer_module)\.")
_WHOLE = re.compile(r"(?:model\.(?:pixel_level_module|transformer_module)|class_predictor|mask_embedder)\.")


@dataclass(frozen=True)
class _Section:
    """A section of config.json, whose values are given out checked."""

    values: dict[str, Any]
    file: Path
    place: str = ""

    def _value(self, key: str) -> Any:
        if key not in self.values:
            close = f"; nearest: {nearest(key, self.values)}" if self.values else ""
            raise InputError(f"{self.file}: the setting '{self.place}{key}' is missing{close}")
        return self.values[key]

    def wrong(self, key: str, expected: str) -> InputError:
        given = repr(self.values.get(key))
        return InputError(f"{self.file}: {self.place}{key}: {expected} is expected (given: {given[:100]})")

    def section(self, key: str) -> _Section:
        if not isinstance(self._value(key), dict):
            raise self.wrong(key, "an object with settings")
        return _Section(self.values[key], self.file, f"{self.place}{key}.")

    def count(self, key: str) -> int:
        value = self._value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise self.wrong(key, f"a whole number in 0..{_LARGEST}")
        return value

    def number(self, key: str) -> float:
        value = self._value(key)
        if not _is_number(value):
            raise self.wrong(key, "a number")
        return value

    def layers(self, key: str, tensors: Iterable[str], pattern: str) -> int:
        """A number of layers, which is that of the weights."""
        told, there = self.count(key), count(tensors, pattern, self.file.parent)
        if told != there:
            raise InputError(
                f"{self.file}: {self.place}{key} is {told}, the weights have {there} such layers"
            )
        return told

    def expect(self, **usual: Any) -> None:
        """Settings that change what is computed without a trace in the tensors: absent, or as usual."""
        for key, value in usual.items():
            if self.values.get(key, value) != value:
                raise self.wrong(key, f"{value!r}, the only kind that is supported,")


def read_huggingface(folder: Path) -> ForeignModel:
    """A folder with config.json and weights (safetensors or .bin, in one file or in shards).

    Raises `InputError`, naming the file, where the folder is incomplete or damaged, holds another kind of
    model, or its config.json and its weights do not go together.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no Hugging Face folder: config.json is missing; {_what_lies_in(folder)}")
    settings = _Section(_read_json(file), file)
    kinds = {
        "mask2former": (_to_config, huggingface_names),
        "maskformer": (_to_maskformer, huggingface_maskformer_names),
    }
    kind = settings.values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{file}: model_type 'mask2former' or 'maskformer' is expected, not {kind!r:.100}")
    to_config, usual_names = kinds[kind]
    names_of: Callable[[str], Names | None] = usual_names
    class_names = _class_names(settings)
    unwrapped = _unwrap(_read_weights(folder), folder)
    with settings_found_in(file):
        config = to_config(settings, unwrapped.tensors)
    if settings.section("backbone_config").values.get("model_type") == "timm_backbone":
        names_of = with_timm_backbone(names_of)
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return ForeignModel(unwrapped, config, class_names, names_of)
    processor = _Section(_read_json(file), file)
    resize, notes = _test_resize(processor)
    config = config.with_backbone(**_normalization(processor))
    return ForeignModel(unwrapped, config, class_names, names_of, resize, notes)


def _normalization(settings: _Section) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of the backbone's settings, of images in 0..255, by preprocessor_config.json."""
    given = settings.values
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    if not _is_number(factor) or factor <= 0:
        raise settings.wrong("rescale_factor", "a number above 0")
    found = {}
    for name, key, none, least in (("mean", "image_mean", 0.0, -math.inf), ("std", "image_std", 1.0, 0.0)):
        values = given.get(key) if given.get("do_normalize", True) else [none] * 3
        if values is None:  # what `transformers` takes itself is ImageNet's
            return {}
        in_order = isinstance(values, list) and all(_is_number(value) and value > least for value in values)
        if not in_order or len(values) != 3:
            raise settings.wrong(key, "a list of three numbers" + " above 0" * (least == 0))
        found[name] = tuple(round(value / factor, 3) for value in values)
    return found


def _is_number(value: object) -> bool:
    """Whether it is one to reckon with: JSON as Python reads it has NaN, too, and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _BEYOND


def _test_resize(settings: _Section) -> tuple[TestResize | None, tuple[str, ...]]:
    """The size that preprocessor_config.json brings images to; a note where ours differs."""
    size = settings.values.get("size")
    if settings.values.get("do_resize") is False:
        return TestResize(short=None, long=None), ()
    if isinstance(size, int) and not isinstance(size, bool):  # of early versions
        size = {"shortest_edge": size, "longest_edge": settings.values.get("max_size")}
    if not isinstance(size, dict):
        return None, ()
    short, long = size.get("shortest_edge"), size.get("longest_edge", size.get("max_height"))
    if short is None and (long is None or long != size.get("max_width")):
        told = json.dumps(size)[:80]
        return None, (f"its test size {told} changes the aspect, which is not done here: COCO's is taken",)
    for side, most in ((short, _LONGEST_SIDE), (long, math.inf)):
        if side is not None and (type(side) is not int or not 1 <= side <= most):
            raise settings.wrong("size", f"sides in pixels, the shorter one up to {_LONGEST_SIDE},")
    # `transformers` needs a limit where there is none
    return TestResize(short=short, long=None if long is None or long > _LARGEST else long), ()


def _what_lies_in(folder: Path) -> str:
    if (folder / "checkpoints").is_dir() or (folder / "state.json").is_file():
        return "it is a run or checkpoint of mpformer, which is used as it is"
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"


def _class_names(settings: _Section) -> tuple[str, ...]:
    """The names in the order of their ids; () where config.json names none."""
    names = settings.values.get("id2label")
    if names is None or names == {}:
        return ()
    if not isinstance(names, dict):
        raise settings.wrong("id2label", 'an object such as {"0": "cat", "1": "dog"}')
    for id, name in names.items():
        if not id.isdecimal():
            swapped = ": these are names with their ids, as in label2id" if isinstance(name, int) else ""
            raise InputError(
                f"{settings.file}: id2label: {id[:100]!r} is no id: whole numbers are expected as keys, such "
                f'as "0"{swapped}'
            )
        if not isinstance(name, str):
            raise InputError(f"{settings.file}: id2label: {id}: a name is expected, not {name!r:.100}")
    if absent := [i for i in range(len(names)) if str(i) not in names]:
        raise InputError(
            f"{settings.file}: id2label: {len(names)} classes have the ids 0 to {len(names) - 1}; "
            f"{absent[0]} is missing"
        )
    return tuple(names[str(i)] for i in range(len(names)))


def _unwrap(tensors: dict[str, Tensor], folder: Path) -> Unwrapped:
    found = unwrap(tensors, lambda name: _WHOLE.match(name) is not None, folder)
    if not any(name.startswith("model.") and _WHOLE.match(name) for name in found.tensors):
        # saved from the inner model, whose names lack the first word
        found = unwrap(tensors, lambda name: _BASE.match(name) is not None, folder)
        base = {f"model.{k}" if _BASE.match(k) else k: v for k, v in found.tensors.items()}
        found = replace(found, tensors=base)
    # a backbone of timm has timm's names in files, too
    named = {k if "._backbone." in k else name_in_files(k): tensor for k, tensor in found.tensors.items()}
    # where both are there, the one that needed no other name
    return replace(found, tensors=named | {k: v for k, v in found.tensors.items() if k in named})


def _read_json(file: Path) -> dict[str, Any]:
    check_text(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: an object with settings is expected, not a {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for stem in _WEIGHTS:
        if (folder / stem).exists():
            return read_tensors(folder / stem)
        if (folder / f"{stem}.index.json").exists():
            return _read_shards(folder / f"{stem}.index.json")
    raise InputError(
        f"{folder}: neither {' nor '.join(_WEIGHTS)}, nor an index of shards; {_what_lies_in(folder)}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index}: weight_map: an object with a file for each tensor is expected")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        file = index.parent / Path(shard).name
        if not Path(shard).name or not file.exists():
            lost = list(places.values()).count(shard)
            raise InputError(
                f"{index}: the shard {shard[:100]!r} with {lost} of {len(places)} tensors is missing "
                "in its folder"
            )
        tensors |= read_tensors(file)
    if absent := [name for name in places if name not in tensors]:
        raise InputError(
            f"{index}: {len(absent)} of its {len(places)} tensors are in none of the shards: "
            f"{shown(absent[0])}, ..."
        )
    return tensors


def _to_config(settings: _Section, tensors: dict[str, Tensor]) -> Model:
    settings.expect(
        pre_norm=False, activation_function="relu", common_stride=4, feature_strides=[4, 8, 16, 32]
    )
    encoder = r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\."
    return Model(
        backbone=_to_backbone(settings.section("backbone_config")),
        pixel_decoder=PixelDecoder(
            layers=settings.layers("encoder_layers", tensors, encoder),
            channels=settings.count("feature_size"),
            heads=settings.count("num_attention_heads"),
            ffn=settings.count("encoder_feedforward_dim"),
        ),
        decoder=Decoder(
            queries=settings.count("num_queries"),
            layers=_decoder_layers(settings, tensors),
            heads=settings.count("num_attention_heads"),
            ffn=settings.count("dim_feedforward"),
            dropout=settings.number("dropout"),
        ),
        pilot=Pilot(queries=0),
        loss=Loss(
            class_weight=settings.number("class_weight"),
            mask_weight=settings.number("mask_weight"),
            dice_weight=settings.number("dice_weight"),
            no_object_weight=settings.number("no_object_weight"),
            points=settings.count("train_num_points"),
            oversample=settings.number("oversample_ratio"),
            importance=settings.number("importance_sample_ratio"),
        ),
    )


_LAYER = r"model\.transformer_module\.decoder\.layers\.(\d+)\."


def _decoder_layers(settings: _Section, tensors: Iterable[str]) -> int:
    # decoder_layers counts the prediction before the first layer, too
    told, there = settings.count("decoder_layers") - 1, count(tensors, _LAYER, settings.file.parent)
    if told != there:
        raise InputError(
            f"{settings.file}: decoder_layers is {told + 1}, the weights have {there} layers, for which "
            f"{there + 1} is expected"
        )
    return told


def _to_maskformer(settings: _Section, tensors: dict[str, Tensor]) -> Model:
    decoder = settings.section("decoder_config")
    decoder.expect(activation_function="relu")
    return Model(
        backbone=_to_backbone(settings.section("backbone_config")),
        pixel_decoder=PixelDecoder(kind="fpn", channels=settings.count("fpn_feature_size"), last_kernel=3),
        decoder=maskformer_decoder(
            queries=decoder.count("num_queries"),
            layers=decoder.layers("decoder_layers", tensors, _LAYER),
            heads=decoder.count("decoder_attention_heads"),
            ffn=decoder.count("decoder_ffn_dim"),
            dropout=decoder.number("dropout"),
        ),
        pilot=Pilot(queries=0),
        loss=Loss(
            class_weight=settings.number("cross_entropy_weight"),
            mask_weight=settings.number("mask_weight"),
            dice_weight=settings.number("dice_weight"),
            no_object_weight=settings.number("no_object_weight"),
            mask_loss="focal",
            points=None,
        ),
    )


def _to_backbone(settings: _Section) -> Backbone:
    kind, depths = settings.values.get("model_type"), settings.values.get("depths", [])
    if not isinstance(depths, list) or not all(isinstance(depth, int) for depth in depths):
        raise settings.wrong("depths", "a list of whole numbers")
    name = None
    if kind == "timm_backbone":
        return _to_timm_backbone(settings)
    if kind in ("swin", "maskformer-swin") and depths[:2] == [2, 2] and len(depths) == 4:
        settings.expect(
            hidden_act="gelu", qkv_bias=True, use_absolute_embeddings=False, patch_size=4, num_channels=3
        )
        name = SWINS.get((settings.count("embed_dim"), depths[2], settings.count("window_size")))
    elif kind == "resnet":
        settings.expect(
            hidden_act="relu", downsample_in_bottleneck=False, downsample_in_first_stage=False, num_channels=3
        )
        name = RESNETS.get((str(settings.values.get("layer_type", "bottleneck")), tuple(depths)))
    if name is None:
        raise InputError(
            f"{settings.file}: backbone {kind!s:.50} {depths!s:.100} is none of "
            f"{', '.join([*RESNETS.values(), *SWINS.values()])}"
        )
    return Backbone(name=name, pretrained=None)


def _to_timm_backbone(settings: _Section) -> Backbone:
    name = settings.values.get("backbone")
    if not isinstance(name, str):
        raise settings.wrong("backbone", "the name of a model of timm")
    replaced = {ours: usual for usual, ours in WITH_GROUP_NORM.items()}
    if name in replaced:
        return Backbone(name=replaced[name], pretrained=None, norm="group_norm")
    return Backbone(name=name, pretrained=None)
