"""The pixel decoder of Mask2Former: multi-scale deformable attention, then one FPN step to stride 4.

The convolutional ones are in `convolutional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer import plugin
from mpformer.config.model import PixelDecoder as PixelDecoderConfig
from mpformer.model.convolutional import CONVOLUTIONAL, zero_bias
from mpformer.model.points import cell_centers
from mpformer.model.position import sine_position
from mpformer.ops import ms_deform_attn_fused
from mpformer.plugin import is_reference
from mpformer.types import MEMORY_STRIDES, InputError

LEVELS = len(MEMORY_STRIDES)
"""Feature levels over which deformable attention samples."""
_NORM_GROUPS = 32


class PixelDecoder(Protocol):
    """The contract of a pixel decoder, which `model.pixel_decoder.kind` names: a `torch.nn.Module`.

    A plug-in is made with (channels, backbone_channels) and its options. channels: those of all maps that it
    returns; backbone_channels: those of the backbone's maps, finest first. Layers in an attribute `layers`
    take part in activation checkpointing.
    """

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Backbone maps [B,C_i,H/s,W/s] at strides 4, 8, 16, 32 -> mask features [B,C,H/4,W/4] and memories
        [B,C,H/s,W/s] at strides 32, 16, 8."""


class DeformableAttention(nn.Module):
    """Multi-scale deformable self-attention of one encoder layer (Deformable DETR, equation 3)."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(channels, heads * LEVELS * points * 2)
        self.attention_weights = nn.Linear(channels, heads * LEVELS * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._reset()

    def _reset(self) -> None:
        # each head starts with a direction of its own, point k at distance k + 1
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=1)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        distance = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.expand(-1, LEVELS, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, memory: Tensor, shapes: tuple[tuple[int, int], ...], reference: Tensor
    ) -> Tensor:
        """query and memory [B,S,C], reference [1,S,levels,2] as (x, y) in 0..1 -> [B,S,C]."""
        batch, length, _ = query.shape
        value = self.value_proj(memory).unflatten(2, (self.heads, -1))
        offsets = self.sampling_offsets(query).view(batch, length, self.heads, LEVELS, self.points, 2)
        logits = self.attention_weights(query).view(batch, length, self.heads, LEVELS, self.points)
        return self.output_proj(ms_deform_attn_fused(value, shapes, reference, offsets, logits))


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward network, each with residual and norm after it."""

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        channels = config.channels
        self.self_attn = DeformableAttention(channels, config.heads, config.points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, config.ffn)
        self.linear2 = nn.Linear(config.ffn, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, position: Tensor, shapes: tuple[tuple[int, int], ...], reference: Tensor
    ) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, x, shapes, reference))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DeformablePixelDecoder(nn.Module):
    """MSDeformAttn over strides 32, 16 and 8, with mask features at stride 4 (Mask2Former section 3.2.2)."""

    def __init__(self, config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> None:
        super().__init__()
        channels = config.channels
        self.channels = channels
        groups = math.gcd(_NORM_GROUPS, channels)
        projections = [nn.Conv2d(c, channels, 1) for c in reversed(backbone_channels[1:])]
        self.input_proj = nn.ModuleList(
            nn.Sequential(projection, nn.GroupNorm(groups, channels)) for projection in projections
        )
        self.level_embed = nn.Parameter(torch.empty(LEVELS, channels))
        layers = [EncoderLayer(config) for _ in range(config.layers)]
        self.layers = nn.ModuleList(layers)
        lateral = nn.Conv2d(backbone_channels[0], channels, 1, bias=False)
        self.lateral = nn.Sequential(lateral, nn.GroupNorm(groups, channels))
        smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.smooth = nn.Sequential(smooth, nn.GroupNorm(groups, channels), nn.ReLU())
        kernel = config.last_kernel or 1
        self.mask_features = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.normal_(self.level_embed)
        for layer in layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
            zero_bias(projection)
        for conv in (lateral, smooth, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        zero_bias(self.mask_features)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Backbone maps, finest first -> (mask features [B,C,H/4,W/4], memories [B,C,h,w] at 32, 16, 8)."""
        projected = [p(f) for p, f in zip(self.input_proj, reversed(features[1:]))]
        shapes = tuple((f.shape[2], f.shape[3]) for f in projected)
        tokens = torch.cat([f.flatten(2).transpose(1, 2) for f in projected], dim=1)
        position = torch.cat(
            [
                sine_position(h, w, self.channels, tokens.device, tokens.dtype) + embedding
                for (h, w), embedding in zip(shapes, self.level_embed)
            ]
        )[None]
        centers = torch.cat([cell_centers(shape, tokens.device) for shape in shapes])
        reference = centers[None, :, None, :].expand(1, -1, LEVELS, 2)
        for layer in self.layers:
            tokens = layer(tokens, position, shapes, reference)
        memories = tuple(
            level.transpose(1, 2).unflatten(2, shape)
            for level, shape in zip(tokens.split([h * w for h, w in shapes], dim=1), shapes)
        )
        fine = self.lateral(features[0])
        raised = F.interpolate(memories[-1], size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.smooth(fine + raised)), memories


DECODERS: dict[str, Callable[[PixelDecoderConfig, tuple[int, ...]], nn.Module]] = {
    "deformable": DeformablePixelDecoder,
    **CONVOLUTIONAL,
}
"""By `pixel_decoder.kind`."""


def build_pixel_decoder(config: PixelDecoderConfig, backbone_channels: tuple[int, ...]) -> nn.Module:
    """The pixel decoder of the settings, for backbone maps of those channels, finest first.

    Raises `InputError` for a plug-in that does not keep the contract, `PixelDecoder`.
    """
    if not is_reference(config.kind):
        return DECODERS[config.kind](config, backbone_channels)
    place = "model.pixel_decoder.kind"
    decoder = plugin.build(
        config.kind, config.options, PixelDecoder, place, config.channels, backbone_channels
    )
    if not isinstance(decoder, nn.Module):
        raise InputError(f"{place}: {config.kind}: a torch.nn.Module is expected")
    return decoder
