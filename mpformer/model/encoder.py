"""DETR's transformer encoder on the backbone's coarsest map, which MaskFormer adds for panoptic ResNets."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.model import Decoder as DecoderConfig
from mpformer.model.attention import Attention
from mpformer.model.position import sine_position


class EncoderLayer(nn.Module):
    """Self-attention of all cells and feed-forward network; residual and norm after each."""

    def __init__(self, config: DecoderConfig, channels: int) -> None:
        super().__init__()
        self.self_attn = Attention(channels, config.heads, config.dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, config.ffn)
        self.linear2 = nn.Linear(config.ffn, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B,S,C], position [S,C] -> [B,S,C]."""
        placed = x + position
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """A projection to `channels` and `decoder.encoder_layers` layers (DETR, section 3.2)."""

    def __init__(self, config: DecoderConfig, in_channels: int, channels: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv2d(in_channels, channels, 1)
        self.layers = nn.ModuleList(EncoderLayer(config, channels) for _ in range(config.encoder_layers))

    def forward(self, feature: Tensor) -> Tensor:
        """[B,C',h,w] -> [B,C,h,w]."""
        x = self.input_proj(feature)
        _, channels, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        position = sine_position(h, w, channels, x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, position)
        return x.transpose(1, 2).unflatten(2, (h, w))
