"""Convolutional pixel decoders (Mask2Former Table 4e): FPN (MaskFormer's, too), Semantic FPN, BiFPN, FaPN.

All of them turn the backbone's maps, finest first, into mask features [B,C,H/4,W/4] and three memories
[B,C,h,w] at strides 32, 16, 8. Code was released for FPN only; for the others the papers cite the source and
print FLOPs, which these modules reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.model import PixelDecoder as PixelDecoderConfig
from mpformer.model.points import at_least_float32

Decoded = tuple[Tensor, tuple[Tensor, ...]]


def conv_norm(in_channels: int, channels: int, kernel: int, relu: bool = True) -> nn.Sequential:
    """Convolution without bias, GroupNorm of (at most) 32 groups, ReLU if wanted."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    layers = [conv, nn.GroupNorm(math.gcd(32, channels), channels)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def mask_features_conv(channels: int, kernel: int) -> nn.Conv2d:
    """The last convolution of every pixel decoder."""
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    zero_bias(conv)
    return conv


def zero_bias(layer: nn.Conv2d) -> None:
    """Set the bias of a convolution that has one to zero."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _raised(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


class FPN(nn.Module):
    """Top-down: each map, projected, plus the raised coarser one, smoothed (MaskFormer section 4.1)."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> None:
        super().__init__()
        channels, (*finer, coarsest) = config.channels, backbone_channels
        # coarse to fine; the coarsest map is smoothed straight from the backbone's channels
        self.laterals = nn.ModuleList(conv_norm(c, channels, 1, relu=False) for c in reversed(finer))
        self.outputs = nn.ModuleList(conv_norm(c, channels, 3) for c in (coarsest, *[channels] * len(finer)))
        self.mask_features = mask_features_conv(channels, config.last_kernel or 3)

    def forward(self, features: tuple[Tensor, ...]) -> Decoded:
        """Backbone maps, finest first -> (mask features [B,C,H/4,W/4], memories [B,C,h,w] at 32, 16, 8)."""
        maps = self.top_down(features)
        return self.mask_features(maps[-1]), tuple(maps[:-1])

    def top_down(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """The smoothed maps [B,C,h,w], coarse to fine."""
        *finer, coarsest = features
        maps = [self.outputs[0](coarsest)]
        for lateral, output, feature in zip(self.laterals, self.outputs[1:], reversed(finer)):
            projected = lateral(feature)
            maps.append(output(projected + _raised(maps[-1], projected)))
        return maps


class SemanticFPN(FPN):
    """FPN, then each map raised to stride 4 by convolutions, and their sum (Panoptic FPN, section 3)."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> None:
        super().__init__(config, backbone_channels)
        channels = config.channels
        # strides 32, 16, 8 are doubled 3, 2 and 1 times after a convolution each; stride 4 gets one, too
        self.raising = nn.ModuleList(_Raise(channels, count) for count in (3, 2, 1, 1))

    def forward(self, features: tuple[Tensor, ...]) -> Decoded:
        """As `FPN.forward`."""
        maps = self.top_down(features)
        raised = [raise_(x, maps[-1].shape[2:]) for raise_, x in zip(self.raising, maps)]
        return self.mask_features(sum(raised[1:], raised[0])), tuple(maps[:-1])


class _Raise(nn.ModuleList):
    """Convolutions, each followed by doubling the map until it has the size wanted."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__(conv_norm(channels, channels, 3) for _ in range(count))

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        for conv in self:
            x = conv(x)
            if x.shape[2:] != size:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x


class WeightedSum(nn.Module):
    """Maps mixed by learned weights that are not negative and sum to (almost) 1, then smoothed (BiFPN)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.conv = conv_norm(channels, channels, 3)

    def forward(self, maps: Iterable[Tensor]) -> Tensor:
        weight = F.relu(self.weight)
        mixed = sum(w * x for w, x in zip(weight, maps))
        return self.conv(mixed / (weight.sum() + 1e-4))


class BiFPN(nn.Module):
    """Top-down, then bottom-up with short cuts (EfficientDet, section 3).

    One round of full 3x3 convolutions: that, of the variants of BiFPN in use, gives the FLOPs that
    Mask2Former prints, within 2 %. As in EfficientDet's first round, short cuts have projections of
    their own.
    """

    def __init__(self, config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> None:
        super().__init__()
        channels, count = config.channels, len(backbone_channels)
        self.laterals = nn.ModuleList(conv_norm(c, channels, 1, relu=False) for c in backbone_channels)
        self.short_cuts = nn.ModuleList(
            conv_norm(c, channels, 1, relu=False) for c in backbone_channels[1:-1]
        )
        self.down = nn.ModuleList(WeightedSum(2, channels) for _ in range(count - 1))
        # the coarsest map has no node of its own in the top-down half
        self.up = nn.ModuleList(WeightedSum(3 if i < count - 1 else 2, channels) for i in range(1, count))
        self.mask_features = mask_features_conv(channels, config.last_kernel or 3)

    def forward(self, features: tuple[Tensor, ...]) -> Decoded:
        """As `FPN.forward`."""
        start = [lateral(f) for lateral, f in zip(self.laterals, features)]
        middle = start[:]
        for i in reversed(range(len(start) - 1)):
            middle[i] = self.down[i]((start[i], _raised(middle[i + 1], start[i])))
        end = middle[:]
        for i, node in enumerate(self.up, start=1):
            lowered = F.max_pool2d(end[i - 1], 3, stride=2, padding=1)
            if i < len(start) - 1:
                end[i] = node((self.short_cuts[i - 1](features[i]), middle[i], lowered))
            else:
                end[i] = node((start[i], lowered))
        return self.mask_features(end[0]), tuple(reversed(end[1:]))


class DeformableConv(nn.Module):
    """A 3x3 convolution whose taps are moved and weighted cell by cell (DCN v2), by bilinear sampling.

    The channels form groups that share their offsets. Offsets start at zero and weights at a half, so it
    starts as half a convolution. Plain PyTorch, which runs on every device.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = nn.Conv2d(channels, channels, 3)  # holds the weights, is never called
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        zero_bias(self.conv)
        self.moves = nn.Conv2d(channels, groups * 9 * 3, 3, padding=1)
        nn.init.zeros_(self.moves.weight)
        zero_bias(self.moves)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x [B,C,h,w]: the map; guide [B,C,h,w]: predicts the offsets -> [B,C,h,w]; zero outside."""
        batch, _, h, w = x.shape
        # half precision cannot tell neighbouring cells of a large map apart
        x = at_least_float32(x)
        moves = at_least_float32(self.moves(guide)).view(batch * self.groups, 9, 3, h, w)
        y, column = torch.meshgrid(
            torch.arange(h, dtype=x.dtype, device=x.device),
            torch.arange(w, dtype=x.dtype, device=x.device),
            indexing="ij",
        )
        grouped = x.reshape(batch * self.groups, -1, h, w)
        taps = []
        for tap in range(9):
            at_x = column + tap % 3 - 1 + moves[:, tap, 0]
            at_y = y + tap // 3 - 1 + moves[:, tap, 1]
            grid = torch.stack(((2 * at_x + 1) / w - 1, (2 * at_y + 1) / h - 1), dim=3)
            values = F.grid_sample(grouped, grid, mode="bilinear", align_corners=False)
            taps.append((values * moves[:, tap, 2, None].sigmoid()).view(batch, -1, h, w))
        # a 3x3 convolution is one product with its nine taps laid side by side
        weight = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        return F.conv2d(torch.cat(taps, dim=1), weight[:, :, None, None], self.conv.bias)


class FeatureSelection(nn.Module):
    """Channels of a map emphasised by their mean, then projected (FaPN, section 3.2)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.importance = nn.Conv2d(in_channels, in_channels, 1)
        self.project = conv_norm(in_channels, channels, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        importance = self.importance(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.project(x + x * importance)


class FaPN(nn.Module):
    """FPN whose raised maps are aligned to the finer ones by deformable convolution (FaPN, section 3)."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> None:
        super().__init__()
        channels, (*finer, coarsest) = config.channels, backbone_channels
        self.top = conv_norm(coarsest, channels, 1, relu=False)
        self.select = nn.ModuleList(FeatureSelection(c, channels) for c in reversed(finer))
        self.guide = nn.ModuleList(conv_norm(2 * channels, channels, 1, relu=False) for _ in finer)
        self.align = nn.ModuleList(DeformableConv(channels, config.heads) for _ in finer)
        self.outputs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in backbone_channels)
        self.mask_features = mask_features_conv(channels, config.last_kernel or 3)

    def forward(self, features: tuple[Tensor, ...]) -> Decoded:
        """As `FPN.forward`."""
        *finer, coarsest = features
        x = self.top(coarsest)
        maps = [self.outputs[0](x)]
        steps = zip(self.select, self.guide, self.align, self.outputs[1:], reversed(finer))
        for select, guide, align, output, feature in steps:
            selected = select(feature)
            raised = F.interpolate(x, size=selected.shape[2:], mode="bilinear", align_corners=False)
            moved = align(raised, guide(torch.cat((selected, 2 * raised), dim=1)))
            x = selected + F.relu(moved)
            maps.append(output(x))
        return self.mask_features(maps[-1]), tuple(maps[:-1])


CONVOLUTIONAL = {"fpn": FPN, "semantic_fpn": SemanticFPN, "bifpn": BiFPN, "fapn": FaPN}
"""By `pixel_decoder.kind`."""
