"""Backbones from timm: four feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpformer.config_model import Backbone as BackboneConfig
from mpformer.types import InputError
from mpformer.yamlfile import nearest

# torchvision from PyPI is built for CUDA. Beside a CPU build of torch its library does not load, and its
# Python part then fails on two operators that nobody defined, which takes `import timm` down with it.
# Declaring their schemas is enough for the import; neither operator is ever called here.
_declared_operators = None
if torch.version.cuda is None:
    _declared_operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _declared_operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from timm.layers import BatchNormAct2d, GroupNormAct, freeze_batch_norm_2d  # noqa: E402

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """A timm feature extractor.

    `channels`: channels of the four maps, finest first.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if not timm.is_model(config.name):
            close = nearest(config.name, timm.list_models())
            raise InputError(f"model.backbone.name: timm has no model '{config.name}'; nearest: {close}")
        name = f"{config.name}.{config.pretrained}" if config.pretrained else config.name
        try:
            body = timm.create_model(name, pretrained=bool(config.pretrained), features_only=True)
        except RuntimeError as error:
            if config.pretrained and "tag" in str(error):
                tags = ", ".join(m.partition(".")[2] for m in timm.list_pretrained(f"{config.name}.*"))
                raise InputError(
                    f"model.backbone.pretrained: {config.name} has no tag '{config.pretrained}', but: {tags}"
                ) from None
            raise
        except OSError as error:
            raise InputError(
                f"model.backbone.pretrained: the weights {name} are neither cached nor reachable "
                f"({str(error).splitlines()[0]}); model.backbone.pretrained=null starts from random weights"
            ) from None
        reductions = body.feature_info.reduction()
        missing = [s for s in STRIDES if s not in reductions]
        if missing:
            raise InputError(
                f"model.backbone.name: {config.name} has features at strides {reductions}, without {missing}"
            )
        if config.norm == "frozen_bn":
            body = freeze_batch_norm_2d(body)
        elif config.norm == "group_norm":
            body = _to_group_norm(body)
        self.body = body
        _freeze(body, config.frozen_stages)
        self._wanted = tuple(len(reductions) - 1 - reductions[::-1].index(s) for s in STRIDES)
        self.channels = tuple(body.feature_info.channels()[i] for i in self._wanted)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images [B,3,H,W] -> four maps [B,C_i,H/s_i,W/s_i], finest first."""
        features = self.body(images)
        maps = []
        for i, channels in zip(self._wanted, self.channels):
            feature = features[i]
            # timm's window transformers give [B,h,w,C]
            channels_last = feature.shape[1] != channels and feature.shape[3] == channels
            maps.append(feature.permute(0, 3, 1, 2).contiguous() if channels_last else feature)
        return tuple(maps)


def _freeze(body: nn.Module, stages: int) -> None:
    """Stop the gradient of the first stages: everything up to the stages-th feature map (the stem is one)."""
    ends = [name.replace(".", "_") for name in body.feature_info.module_name()]
    done = 0
    for name, child in body.named_children():
        if done < stages:
            child.requires_grad_(False)
        done += name in ends


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
