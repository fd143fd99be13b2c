"""The masked-attention transformer decoder of Mask2Former, with room for the mask-piloted part of MP-Former.

Queries of the matching part and pilots run through the same layers side by side. What a pilot may see, and
who may see it, is said by attention masks alone; without pilots nothing of them exists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config_model import Decoder as DecoderConfig
from mpformer.config_model import Pilot as PilotConfig
from mpformer.model.attention import Attention
from mpformer.model.position import sine_position
from mpformer.types import Head, Output, Pilots

LEVELS = 3
"""Memories, coarse to fine: strides 32, 16, 8."""


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward network; residual and norm after each."""

    def __init__(self, config: DecoderConfig, channels: int) -> None:
        super().__init__()
        self.cross_attn = Attention(channels, config.heads, config.dropout)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, config.heads, config.dropout)
        self.self_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, config.ffn)
        self.linear2 = nn.Linear(config.ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor | float,
        memory: Tensor,
        memory_position: Tensor,
        may_look: Tensor,
        may_talk: Tensor | None,
    ) -> Tensor:
        """x [B,Q+P,C], query_position [1,Q+P,C] or 0; memory [B,h*w,C]; may_look [B,Q+P,h*w]; may_talk
        [B,Q+P,Q+P] or None for everyone."""
        looked = self.cross_attn(x + query_position, memory + memory_position, memory, may_look)
        x = self.cross_norm(x + self.dropout(looked))
        placed = x + query_position
        x = self.self_norm(x + self.dropout(self.self_attn(placed, placed, x, may_talk)))
        thought = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.ffn_norm(x + self.dropout(thought))


class MaskMLP(nn.Module):
    """Three linear layers that turn a query into its mask embedding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskedDecoder(nn.Module):
    """Learnable queries refined by masked attention to one memory after the other (Mask2Former section 3.2).

    `query_embed` is None where queries have no positions, `pilot_embed` (class embeddings) where there is no
    mask piloting.
    """

    def __init__(self, config: DecoderConfig, pilot: PilotConfig, channels: int, classes: int) -> None:
        super().__init__()
        self.levels = config.levels()
        self.query_feat = nn.Embedding(config.queries, channels)
        self.query_embed = nn.Embedding(config.queries, channels) if pilot.rules().query_positions else None
        self.level_embed = nn.Embedding(LEVELS, channels)
        self.pilot_embed = nn.Embedding(classes, channels) if pilot.queries else None
        self.layers = nn.ModuleList(DecoderLayer(config, channels) for _ in range(config.layers))
        self.norm = nn.LayerNorm(channels)
        self.class_embed = nn.Linear(channels, classes + 1)
        self.mask_embed = MaskMLP(channels)

    def forward(
        self,
        mask_features: Tensor,
        memories: tuple[Tensor, ...],
        pilots: Pilots | None = None,
        all_heads: bool = True,
    ) -> Output:
        """mask_features [B,C,H/4,W/4], memories [B,C,h,w] coarse to fine -> heads (all, or the last one)."""
        batch = len(mask_features)
        queries = self.query_feat.num_embeddings
        flat, positions, sizes = self._flatten(memories)
        x = self.query_feat.weight.expand(batch, -1, -1)
        query_position = 0.0 if self.query_embed is None else self.query_embed.weight[None]
        may_talk = None
        if pilots is not None:
            embedded = self.pilot_embed(pilots.labels.clamp(min=0))
            x = torch.cat((x, embedded * (pilots.labels >= 0)[:, :, None]), dim=1)
            if self.query_embed is not None:
                # the paper is silent on the positions of pilots: none
                query_position = F.pad(query_position, (0, 0, 0, pilots.labels.shape[1]))
            may_talk = _self_attention_rule(queries, pilots)

        heads = []
        for index, (layer, level) in enumerate(zip(self.layers, self.levels)):
            class_logits, mask_logits = self._predict(x, mask_features, classify=all_heads)
            if all_heads:
                heads.append(Head(class_logits, mask_logits))
            may_look = _foreground(mask_logits, sizes[level])
            if pilots is not None and pilots.attention_masks[index] is not None:
                may_look = torch.cat((may_look[:, :queries], pilots.attention_masks[index]), dim=1)
            # a query whose mask is empty looks everywhere
            may_look = may_look | ~may_look.any(dim=2, keepdim=True)
            x = layer(x, query_position, flat[level], positions[level], may_look, may_talk)
        heads.append(Head(*self._predict(x, mask_features, classify=True)))
        if pilots is None:
            return Output(tuple(heads))
        return Output(
            tuple(Head(h.class_logits[:, :queries], h.mask_logits[:, :queries]) for h in heads),
            tuple(Head(h.class_logits[:, queries:], h.mask_logits[:, queries:]) for h in heads),
        )

    def _flatten(
        self, memories: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
        flat, positions, sizes = [], [], []
        for memory, embedding in zip(memories, self.level_embed.weight):
            _, channels, h, w = memory.shape
            flat.append(memory.flatten(2).transpose(1, 2) + embedding)
            positions.append(sine_position(h, w, channels, memory.device, memory.dtype)[None])
            sizes.append((h, w))
        return flat, positions, sizes

    def _predict(self, x: Tensor, mask_features: Tensor, classify: bool) -> tuple[Tensor | None, Tensor]:
        x = self.norm(x)
        mask_logits = torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), mask_features)
        return self.class_embed(x) if classify else None, mask_logits


@torch.no_grad()
def _foreground(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells [B,Q,h*w] in which the resized mask is foreground (probability at least 0.5)."""
    resized = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
    return resized.flatten(2) >= 0


def _self_attention_rule(queries: int, pilots: Pilots) -> Tensor:
    """Who may see whom, [B,Q+P,Q+P] bool (MP-Former appendix B).

    Everyone sees the matching part; a pilot sees its own group besides; padding is seen by nobody.
    """
    batch, slots = pilots.groups.shape
    groups = pilots.groups
    same_group = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, None, :]
    rule = torch.zeros(batch, queries + slots, queries + slots, dtype=torch.bool, device=groups.device)
    rule[:, :, :queries] = True
    rule[:, queries:, queries:] = same_group
    return rule
