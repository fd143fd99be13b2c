"""Backbones from timm: four feature maps at strides 4, 8, 16 and 32, whatever the input size."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import huggingface_hub
import torch
from torch import Tensor, nn

from mpformer.config.model import Backbone as BackboneConfig
from mpformer.config.yamlfile import nearest
from mpformer.model.pyramid import SimpleFeaturePyramid
from mpformer.model.swin import PadThenShift
from mpformer.model.weights.fetching import Attempt, check_reachable
from mpformer.model.weights.hub import WEIGHTS, hub_url
from mpformer.model.weights.prefixes import unwrap
from mpformer.model.weights.tensorfile import read_tensors, shown
from mpformer.types import FEATURE_STRIDES, PIXEL_MEAN, PIXEL_STD, InputError, RunError


def _declare_missing_operators() -> torch.library.Library:
    """Declares `nms` and `qnms` of torchvision where its compiled library does not load.

    torchvision from PyPI is built for CUDA: beside a CPU build of torch its library does not load, and its
    Python part, which timm imports, fails on these two operators. A declaration is enough, neither is called
    here. Where the library loads it has to come first: defining an operator a second time aborts the process.
    """
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package else None
    library = importlib.machinery.PathFinder.find_spec("_C", folders or [])
    if library is not None and library.origin is not None:
        with contextlib.suppress(OSError):
            torch.ops.load_library(library.origin)
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared


_declared_operators = _declare_missing_operators()  # they last as long as this object

import timm  # noqa: E402
from timm.layers import (  # noqa: E402
    BatchNormAct2d,
    Conv2dSame,
    ConvNormAct,
    Format,
    FrozenBatchNormAct2d,
    GroupNormAct,
    freeze_batch_norm_2d,
    pad_same,
)
from timm.models import FeatureInfo  # noqa: E402
from timm.models._efficientnet_blocks import (  # noqa: E402
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
)
from timm.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from timm.models.swin_transformer import SwinTransformerBlock  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+(?=\.)")
"""The name of a transformer's (or ConvNeXt's) block, at the beginning of a parameter's."""


class Backbone(nn.Module):
    """A timm feature extractor.

    `channels`: channels of the four maps, finest first. A plain vision transformer, whose maps all have
    stride 16, gets a simple feature pyramid on its last one.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body = _create(config)
        for module in self.body.modules():
            if type(module) is SwinTransformerBlock:
                module.__class__ = _SwinBlock  # the same parameters, another order of padding and shifting
        info = _feature_info(self.body)
        reductions = info.reduction()
        self.pyramid: SimpleFeaturePyramid | None = None
        if set(reductions) == {16}:
            if config.frozen_stages:
                raise InputError(f"model.backbone.frozen_stages: {config.name} has no stages")
            self._wanted: tuple[int, ...] = (len(reductions) - 1,)
            self.pyramid = SimpleFeaturePyramid(info.channels()[-1])
            self.channels = self.pyramid.channels
        else:
            missing = [s for s in FEATURE_STRIDES if s not in reductions]
            if missing:
                raise InputError(
                    f"model.backbone.name: {config.name} has features at strides {reductions}, "
                    f"without {missing}"
                )
            self._wanted = tuple(len(reductions) - 1 - reductions[::-1].index(s) for s in FEATURE_STRIDES)
            self.channels = tuple(info.channels()[i] for i in self._wanted)
        # timm's window transformers give [B,h,w,C]
        self._channels_last = getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC
        with_norms = _is_swin(config.name) if config.output_norms is None else config.output_norms
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if with_norms else None
        if config.norm == "frozen_bn":
            self.body = freeze_batch_norm_2d(self.body)
            _fold_frozen_norms(self.body)
        elif config.norm == "group_norm":
            self.body = _to_group_norm(self.body)
        _freeze(self.body, config.frozen_stages)
        self._depths = _layer_depths(self.body)
        self.memory_format = torch.contiguous_format
        """Of the maps that go in and come out: `torch.channels_last` suits the convolutions of some GPUs."""

    @property
    def depth(self) -> int:
        """The depth of the deepest layer."""
        return max(self._depths.values())

    @property
    def stages(self) -> tuple[int, ...]:
        """timm's `out_indices` of the maps."""
        indices = _feature_info(self.body).out_indices
        return tuple(indices[i] for i in self._wanted)

    @property
    def is_plain(self) -> bool:
        """Whether the maps are timm's as they are: four, channels first, without norms or pyramid."""
        return self.pyramid is None and self.norms is None and not self._channels_last

    def depth_of(self, name: str) -> int:
        """The layers up to and including the one that a parameter of that name belongs to: transformer blocks
        where there are any, else stages; 0 before the first. What is not the timm model is as deep as its
        last layer."""
        return self._depths.get(name.removeprefix("body."), self.depth)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images [B,3,H,W] -> four maps [B,C_i,H/s_i,W/s_i], finest first."""
        features = self.body(images.contiguous(memory_format=self.memory_format))
        maps = [features[i] for i in self._wanted]
        if self.pyramid is not None:
            return self.pyramid(maps[0])
        if self.norms is not None:
            rows = maps if self._channels_last else [m.permute(0, 2, 3, 1) for m in maps]
            maps = [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, rows)]
        elif self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return tuple(m.contiguous(memory_format=self.memory_format) for m in maps)


def normalization(config: BackboneConfig) -> BackboneConfig:
    """The settings with the `mean` and `std` that images are normalised with.

    Those that are set; else what timm notes of the pretrained weights, of a file what it notes of the model's
    default weights; ImageNet's for random weights and where timm notes nothing.
    """
    if config.mean is not None:
        return config
    mean, std = PIXEL_MEAN, PIXEL_STD
    if config.pretrained is not None:
        tagged = f"{config.name}.{config.pretrained}"
        name = tagged if timm.is_model_pretrained(tagged) else config.name.partition(".")[0]
        known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
        if known is not None:
            mean, std = _of_255(known.mean), _of_255(known.std)
    return config.model_copy(update={"mean": mean, "std": std})


def _of_255(shares: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = (round(255 * share, 3) for share in shares)  # 0.485 -> 123.675, without its rounding
    return red, green, blue


class _SwinBlock(PadThenShift, SwinTransformerBlock):
    """timm's block with the official models' window attention."""


def _feature_info(body: nn.Module) -> FeatureInfo:
    """What a timm feature extractor says of its maps."""
    return cast(FeatureInfo, body.feature_info)


def _is_swin(name: str) -> bool:
    return name.startswith("swin_")


def _create(config: BackboneConfig) -> nn.Module:
    """The timm model, with weights by tag, from a file, or random."""
    name, options = _published(config), _options(config)
    if name is not None:
        with _absence_is_told(name):
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_overlay(name), **options)
    if config.pretrained is None:
        return timm.create_model(config.name, pretrained=False, **options)
    return _from_file(Path(config.pretrained), config, options)


def fetch_pretrained(config: BackboneConfig, hub: Attempt | None = None) -> None:
    """Bring the published weights that the settings ask for into the cache of timm's hub, if they lack there.

    hub: an attempt to reach it that has begun. For a driver, before it starts workers that build the model:
    raises `InputError`, as building does, for an unknown model, for what is neither a tag of it nor a file,
    and where the weights are neither cached nor reachable.
    """
    if (name := _published(config)) is None:
        return
    published = _notes_on(name)
    if _cached(published) is not None:
        return
    with _absence_is_told(name):
        if not published.hf_hub_id:  # a few are files elsewhere, which torch fetches
            return check_reachable(_address(published))
        (hub or Attempt(hub_url())).require()
        try:
            # as timm does when it builds the model: of the default name it prefers the safetensors
            file = published.hf_hub_filename or WEIGHTS[-1]
            timm.models.load_state_dict_from_hf(published.hf_hub_id, file)
        except Exception as error:  # the client of the hub raises those of its HTTP library, too
            raise RunError(str(error) or type(error).__name__) from error


def _published(config: BackboneConfig) -> str | None:
    """timm's name, with the tag, of the weights that are asked for; None for those of a file and random ones.

    Raises `InputError` for an unknown model, and for what is neither a tag of it nor a file.
    """
    if not timm.is_model(config.name):
        close = nearest(config.name, timm.list_models())
        raise InputError(f"model.backbone.name: timm has no model '{config.name}'; nearest: {close}")
    if config.pretrained is None:
        return None
    tags = [m.partition(".")[2] for m in timm.list_pretrained(f"{config.name}.*")]
    if config.pretrained in tags:
        return f"{config.name}.{config.pretrained}"
    if not Path(config.pretrained).is_file():
        raise InputError(
            f"model.backbone.pretrained: '{config.pretrained}' is neither a file nor a tag of {config.name}, "
            f"which has: {', '.join(tags) or 'none'}"
        )
    return None


@contextlib.contextmanager
def _absence_is_told(name: str) -> Iterator[None]:
    """Says in one line what to do where published weights cannot be had."""
    try:
        yield
    except (OSError, RunError) as error:
        raise InputError(
            f"model.backbone.pretrained: the weights {name} are neither cached nor reachable "
            f"({str(error).splitlines()[0]}); model.backbone.pretrained=FILE reads a file of them, "
            "model.backbone.pretrained=null starts from random weights"
        ) from None


def _overlay(name: str) -> dict[str, str]:
    """What timm is told of published weights: without a network, where a cache has them.

    The hub's own client would try to reach it for a minute. Raises `RunError` where they are neither here nor
    reachable.
    """
    published = _notes_on(name)
    try:
        check_reachable(_address(published))
    except RunError:
        if (found := _cached(published)) is None:
            raise
        return {"file": found}
    return {}


def _notes_on(name: str) -> timm.models.PretrainedCfg:
    """What timm notes of published weights."""
    published = timm.get_pretrained_cfg(name)
    assert published is not None  # `list_pretrained` has the name
    return published


def _address(published: timm.models.PretrainedCfg) -> str:
    """Of the server that has published weights."""
    return hub_url() if published.hf_hub_id else str(published.url)


def _cached(published: timm.models.PretrainedCfg) -> str | None:
    """The file of published weights in the cache of the hub, or of torch; None where it has none."""
    if not published.hf_hub_id:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(str(published.url)).name)
        return str(file) if file.is_file() else None
    names = (published.hf_hub_filename,) if published.hf_hub_filename else WEIGHTS
    cached = (huggingface_hub.try_to_load_from_cache(published.hf_hub_id, file) for file in names)
    return next((file for file in cached if isinstance(file, str)), None)


def _from_file(file: Path, config: BackboneConfig, options: dict[str, Any]) -> nn.Module:
    """The timm model with the weights of a file, whose names may have a known wrapper's prefix.

    Raises `InputError` if the file is unreadable, of another model, or lacks some of it: timm would load what
    fits, also under names of older versions, and leave the rest random.
    """
    name = config.name
    tensors = _weights_of(file, name, timm.create_model(name, pretrained=False, **options))
    with torch.random.fork_rng(devices=[]):  # the same random weights as those that timm loads into
        untouched = dict(timm.create_model(name, pretrained=False, **options).named_parameters())
    overlay = {"state_dict": dict(tensors)}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # noqa: BLE001  (timm's converters raise anything on weights that misfit)
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.backbone.pretrained: {file} does not fit {name}: {reason}") from None
    for module in model.modules():
        if isinstance(notes := getattr(module, "pretrained_cfg", None), dict):
            notes.pop("state_dict", None)  # a second copy of the weights
    random = [n for n, p in model.named_parameters() if _is_random(p) and torch.equal(p, untouched[n])]
    if random:
        raise InputError(
            f"model.backbone.pretrained: {file} lacks {len(random)} tensors of {name}, such as {random[0]}"
        )
    statistics = [n for n, _ in model.named_buffers() if n.endswith("running_mean")]
    stored = sum(n.endswith("running_mean") for n in tensors)
    if config.norm != "group_norm" and stored < len(statistics):
        raise InputError(
            f"model.backbone.pretrained: {file} has running statistics of {stored} norms, {name} has "
            f"{len(statistics)}: model.backbone.norm=group_norm goes without them"
        )
    return model


def _is_random(parameter: Tensor) -> bool:
    """Whether a parameter of a new model is drawn at random; norms and biases start as constants."""
    return parameter.ndim > 1 and bool((parameter != parameter.flatten()[0]).any())


def _weights_of(file: Path, name: str, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file without their wrapper. Raises `InputError` if they are of another model."""
    wanted = [re.sub(r"^layers_(\d)", r"layers.\1", own) for own, _ in model.named_parameters()]
    wanted = [own.removeprefix("model.") for own in wanted]
    stored = unwrap(read_tensors(file), set(wanted).__contains__, file).tensors
    if sum(own in stored for own in wanted) < len(wanted) / 2:
        raise InputError(
            f"model.backbone.pretrained: {file} holds no weights of {name}: {shown(next(iter(stored)))}, ... "
            f"where {shown(wanted[0])}, ... is expected"
        )
    return stored


def _options(config: BackboneConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"features_only": True}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if _is_swin(config.name):
        # as in the official models: windows keep their size and shift at every input size, and masks are
        # made for the size at hand (timm otherwise fixes both for the size that a model was built for)
        options |= {"always_partition": True, "strict_img_size": False}
        options["drop_path_rate"] = config.drop_path  # timm's own default is 0.1
    elif config.name.startswith("swinv2_"):
        options["strict_img_size"] = False
    elif config.name.startswith(("vit_", "deit", "eva", "flexivit")):
        options["dynamic_img_size"] = True
    return options


def _layer_depths(body: nn.Module) -> dict[str, int]:
    """`Backbone.depth_of` of each parameter of a timm model."""
    names = [name for name, _ in body.named_parameters()]
    stages = "|".join(re.escape(name.replace(".", "_")) for name in _feature_info(body).module_name())
    layer = _BLOCK if any(map(_BLOCK.match, names)) else re.compile(rf"(?:{stages})(?=\.)")
    begun: set[str] = set()
    depths = {}
    for name in names:
        found = layer.match(name)
        if found:
            begun.add(found[0])
        depths[name] = len(begun)
    return depths


def _freeze(body: nn.Module, stages: int) -> None:
    """Stop the gradient of the first stages: everything up to the stages-th feature map of the timm model."""
    ends = [name.replace(".", "_") for name in _feature_info(body).module_name()]
    done = 0
    for name, child in body.named_children():
        if done < stages:
            child.requires_grad_(False)
        done += name in ends


class _FrozenNorm(Protocol):
    """What torchvision's and timm's frozen norms have: four buffers [C]."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float


class _ConvWithNorm(nn.Conv2d):
    """A convolution that includes the frozen normalisation after it, which saves a pass over the map."""

    norm: tuple[_FrozenNorm]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.scaled())

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of convolution and normalisation together."""
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class _SameConvWithNorm(_ConvWithNorm, Conv2dSame):
    """The same with TensorFlow's padding, which depends on the size of the map."""

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return self._conv_forward(padded, *self.scaled())


class _FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """Keeps its place and its buffers in the model; the convolution before it applies them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _FoldedFrozenBatchNormAct2d(FrozenBatchNormAct2d):
    """The same with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _ConvWithNorm,
    Conv2dSame: _SameConvWithNorm,
    FrozenBatchNorm2d: _FoldedFrozenBatchNorm2d,
    FrozenBatchNormAct2d: _FoldedFrozenBatchNormAct2d,
}
_IN_ORDER = (
    BasicBlock,
    Bottleneck,
    ConvNormAct,
    ConvBnAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    EdgeResidual,
)
"""Blocks that call their layers in the order in which they hold them, as `nn.Sequential` does."""


def _fold_frozen_norms(body: nn.Module) -> None:
    """Fold frozen norms into the convolutions before them, for blocks that are known to be in order."""
    if not any(isinstance(module, _IN_ORDER) for module in body.modules()):
        return
    for module in body.modules():
        if module is not body and not isinstance(module, (nn.Sequential, *_IN_ORDER)):
            continue
        for conv, norm in itertools.pairwise(module.children()):
            if type(conv) in (nn.Conv2d, Conv2dSame) and conv.bias is None and type(norm) in _FOLDED:
                conv.__class__, norm.__class__ = _FOLDED[type(conv)], _FOLDED[type(norm)]
                # in a tuple, so that it is not registered as a submodule of the convolution, too
                cast(_ConvWithNorm, conv).norm = (cast(_FrozenNorm, norm),)


def _to_group_norm(module: nn.Module) -> nn.Module:
    """Every BatchNorm in the tree replaced by GroupNorm of (at most) 32 groups, its affine part kept."""
    if isinstance(module, nn.BatchNorm2d):
        groups = math.gcd(32, module.num_features)
        if isinstance(module, BatchNormAct2d):
            norm: nn.GroupNorm = GroupNormAct(module.num_features, num_groups=groups)
            norm.drop, norm.act = module.drop, module.act
        else:
            norm = nn.GroupNorm(groups, module.num_features)
        norm.weight, norm.bias = module.weight, module.bias
        return norm
    for name, child in module.named_children():
        setattr(module, name, _to_group_norm(child))
    return module
