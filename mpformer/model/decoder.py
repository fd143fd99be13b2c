"""The transformer decoder: Mask2Former's masked attention, or MaskFormer's plain one, with optional pilots.

Queries of the matching part and pilot queries run through the same layers side by side; attention masks alone
separate them. Without pilots no pilot queries are created.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.model import Decoder as DecoderConfig
from mpformer.config.model import Model as ModelConfig
from mpformer.model.attention import Attention, CrossAttention, build_cross_attention
from mpformer.model.mask_logits import mask_logits_of
from mpformer.model.points import cell_centers
from mpformer.model.position import sine_position
from mpformer.types import MEMORY_STRIDES, Head, InputError, Output, Pilots


@dataclass(frozen=True)
class Memory:
    """What a layer attends to: the cells of one map, or of several, one map after another."""

    values: Tensor
    """[B,S,C]"""
    keys: Tensor
    """[B,S,C]: the values with their sine positions."""
    centers: Tensor
    """[S,2]: centres of the cells, (x, y) in 0..1."""
    sizes: tuple[tuple[int, int], ...]
    """(h, w) of each map."""


class DecoderLayer(nn.Module):
    """Cross- and self-attention (in either order), feed-forward network; residual and norm after each."""

    def __init__(self, config: DecoderConfig, channels: int) -> None:
        super().__init__()
        self.self_first = config.order == "self_first"
        self.cross_attn = build_cross_attention(config, channels)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, config.heads, config.dropout) if config.self_attention else None
        self.self_norm = nn.LayerNorm(channels) if config.self_attention else None
        self.linear1 = nn.Linear(channels, config.ffn)
        self.linear2 = nn.Linear(config.ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        memory: Memory,
        cross_mask: Tensor | None,
        self_mask: Tensor | None,
    ) -> Tensor:
        """x [B,Q+P,C] -> the same shape.

        query_position [1,Q+P,C]. cross_mask [B,Q+P,S] and self_mask [B,Q+P,Q+P] bool: True where a query may
        attend to a cell, or to a query; None: to all.
        """
        if self.self_first:
            x = self._attend_to_queries(x, query_position, self_mask)
        query = x + query_position
        attended = self.cross_attn(query, memory.keys, memory.values, cross_mask, memory.centers)
        x = self.cross_norm(x + self.dropout(attended))
        if not self.self_first:
            x = self._attend_to_queries(x, query_position, self_mask)
        return self.ffn_norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))

    def _attend_to_queries(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        if self.self_attn is None or self.self_norm is None:
            return x
        query = x + position
        return self.self_norm(x + self.dropout(self.self_attn(query, query, x, mask)))


class MLP(nn.Module):
    """Three linear layers with ReLU between: a query's mask embedding, or its box."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        sizes = (channels, channels, channels, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class QueryDecoder(nn.Module):
    """Queries that attend to one memory after the other (Mask2Former section 3.2, MaskFormer section 3.3).

    A module that the settings have no use for is None: `query_feat` with zero features, `query_embed`
    without positions, `level_embed` and `input_proj` with the other kind of memory, `class_embed` of
    per-pixel models, `box_embed` without boxes, `pilot_embed` (class embeddings) without mask piloting.
    """

    def __init__(self, config: ModelConfig, classes: int, backbone_channels: int) -> None:
        """backbone_channels: of the memory where that is the backbone's map."""
        super().__init__()
        decoder, channels, queries = config.decoder, config.pixel_decoder.channels, config.queries(classes)
        self.levels = tuple(tuple(map(MEMORY_STRIDES.index, strides)) for strides in decoder.strides())
        self.queries = queries
        self.predicts_first = bool(decoder.heads_before_layers)
        learned = decoder.query_features != "zero"
        # only layers use positions and level embeddings
        positions = config.pilot.rules().query_positions and decoder.layers
        self.query_feat = nn.Embedding(queries, channels) if learned else None
        self.query_embed = nn.Embedding(queries, channels) if positions else None
        from_backbone = decoder.memory == "backbone"
        leveled = decoder.layers and not from_backbone
        self.level_embed = nn.Embedding(len(MEMORY_STRIDES), channels) if leveled else None
        layers = [DecoderLayer(decoder, channels) for _ in range(decoder.layers)]
        self.layers = nn.ModuleList(layers)
        self.cross_attentions: tuple[CrossAttention, ...] = tuple(layer.cross_attn for layer in layers)
        self.masked = any(attention.predicted_masks for attention in self.cross_attentions)
        self.norm = nn.LayerNorm(channels)
        self.class_embed = nn.Linear(channels, classes + 1) if config.output == "masks" else None
        self.mask_embed = MLP(channels, channels)
        self.box_embed = MLP(channels, 4) if config.loss.match_by == "boxes" else None
        project = from_backbone and backbone_channels != channels
        self.input_proj = nn.Conv2d(backbone_channels, channels, 1) if project else None
        # last of the whole model: with the same seed, all else starts as it does without mask piloting
        self.pilot_embed = nn.Embedding(classes, channels) if config.pilot.queries else None

    def forward(
        self,
        mask_features: Tensor,
        memories: tuple[Tensor, ...],
        pilots: Pilots | None = None,
        all_heads: bool = True,
    ) -> Output:
        """mask_features [B,C,H/4,W/4], memories [B,C,h,w] coarse to fine (or the backbone's one map) -> heads
        (all, or the last one)."""
        batch, channels = mask_features.shape[:2]
        queries = self.queries
        if self.query_feat is None:
            x = self.norm.weight.new_zeros(batch, queries, channels)
        else:
            x = self.query_feat.weight.expand(batch, -1, -1)
        if self.query_embed is None:
            query_position = x.new_zeros(1, 1, channels)
        else:
            query_position = self.query_embed.weight[None]
        self_mask = None
        if pilots is not None:
            x = torch.cat((x, self._embedded(pilots)), dim=1)
            if self.query_embed is not None:
                # the paper is silent on the positions of pilots: none
                query_position = F.pad(query_position, (0, 0, 0, pilots.labels.shape[1]))
            self_mask = _self_attention_mask(queries, pilots)

        memory_of = {levels: self._memory(memories, levels) for levels in set(self.levels)}
        heads = []
        for index, (layer, levels) in enumerate(zip(self.layers, self.levels)):
            memory = memory_of[levels]
            piloted = None if pilots is None else pilots.attention_masks[index]
            returned = all_heads and (index > 0 or self.predicts_first)
            cross_mask = None
            if returned or self.masked:
                head = self._predict(x, mask_features, whole=returned)
                if returned:
                    heads.append(head)
                if self.masked:
                    predicted = head.mask_logits if piloted is None else head.mask_logits[:, :queries]
                    cross_mask = _foreground(predicted, memory.sizes)
            if piloted is not None:
                if cross_mask is None:
                    cross_mask = piloted.new_ones(batch, queries, piloted.shape[2])
                cross_mask = torch.cat((cross_mask, piloted), dim=1)
            if cross_mask is not None:
                # a query whose mask is empty attends everywhere
                cross_mask = cross_mask | ~cross_mask.any(dim=2, keepdim=True)
            x = layer(x, query_position, memory, cross_mask, self_mask)
        heads.append(self._predict(x, mask_features, whole=True))
        if pilots is None:
            return Output(tuple(heads))
        parts = [_split(head, queries) for head in heads]
        return Output(tuple(matching for matching, _ in parts), tuple(piloted for _, piloted in parts))

    def _embedded(self, pilots: Pilots) -> Tensor:
        """[B,P,C]: embeddings of the pilots' classes, zero in padding slots."""
        if self.pilot_embed is None:
            raise InputError("pilots for a model without mask piloting (model.pilot.queries is 0)")
        embedded = self.pilot_embed(pilots.labels.clamp(min=0))
        return embedded * (pilots.labels >= 0)[:, :, None]

    def _memory(self, maps: tuple[Tensor, ...], levels: tuple[int, ...]) -> Memory:
        values, keys, centers, sizes = [], [], [], []
        for level in levels:
            value = maps[level] if self.input_proj is None else self.input_proj(maps[level])
            _, channels, h, w = value.shape
            value = value.flatten(2).transpose(1, 2)
            if self.level_embed is not None:
                value = value + self.level_embed.weight[level]
            values.append(value)
            keys.append(value + sine_position(h, w, channels, value.device, value.dtype))
            centers.append(cell_centers((h, w), value.device))
            sizes.append((h, w))
        return Memory(torch.cat(values, 1), torch.cat(keys, 1), torch.cat(centers), tuple(sizes))

    def _predict(self, x: Tensor, mask_features: Tensor, whole: bool) -> Head:
        """The predictions of all queries; not `whole`: their masks only."""
        x = self.norm(x)
        mask_logits = mask_logits_of(self.mask_embed(x), mask_features)
        class_logits = self.class_embed(x) if whole and self.class_embed is not None else None
        boxes = self.box_embed(x).sigmoid() if whole and self.box_embed is not None else None
        return Head(class_logits, mask_logits, boxes)


class PixelClassifier(nn.Module):
    """Class maps by one convolution of the mask features: PerPixelBaseline's whole decoder (MaskFormer 4)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.predictor = nn.Conv2d(channels, classes, 1)

    def forward(
        self,
        mask_features: Tensor,
        memories: tuple[Tensor, ...],
        pilots: Pilots | None = None,
        all_heads: bool = True,
    ) -> Output:
        """mask_features [B,C,H/4,W/4] -> the one head; nothing else is used."""
        if pilots is not None:
            raise InputError("pilots for a per-pixel model")
        return Output((Head(None, self.predictor(mask_features)),))


def _split(head: Head, queries: int) -> tuple[Head, Head]:
    """The predictions of the matching part, which are the first `queries`, and those of the pilots."""
    sizes = (queries, head.mask_logits.shape[1] - queries)

    def split(values: Tensor | None) -> Sequence[Tensor | None]:
        return (None, None) if values is None else values.split(sizes, dim=1)

    masks = head.mask_logits.split(sizes, dim=1)
    matching, piloted = map(Head, split(head.class_logits), masks, split(head.boxes))
    return matching, piloted


@torch.no_grad()
def _foreground(mask_logits: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Cells [B,Q,S] in which the resized mask is foreground (probability at least 0.5)."""
    resized = [F.interpolate(mask_logits, size=s, mode="bilinear", align_corners=False) for s in sizes]
    return torch.cat([r.flatten(2) for r in resized], dim=2) >= 0


def _self_attention_mask(queries: int, pilots: Pilots) -> Tensor:
    """Which query may attend to which, [B,Q+P,Q+P] bool (MP-Former appendix B).

    All attend to the matching part, pilots to their own group besides, and none to padding.
    """
    batch, slots = pilots.groups.shape
    groups = pilots.groups
    same_group = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, None, :]
    mask = torch.zeros(batch, queries + slots, queries + slots, dtype=torch.bool, device=groups.device)
    mask[:, :, :queries] = True
    mask[:, queries:, queries:] = same_group
    return mask
