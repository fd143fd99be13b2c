"""The transformer decoder: Mask2Former's masked attention, or MaskFormer's plain one, with room for pilots.

Queries of the matching part and pilots run through the same layers side by side. What a pilot may see, and
who may see it, is said by attention masks alone; without pilots nothing of them exists.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.model import Decoder as DecoderConfig
from mpformer.config.model import Model as ModelConfig
from mpformer.model.attention import CROSS_ATTENTIONS, Attention
from mpformer.model.mask_logits import mask_logits_of
from mpformer.model.points import cell_centers
from mpformer.model.position import sine_position
from mpformer.types import Head, Output, Pilots

LEVELS = 3
"""Memories, coarse to fine: strides 32, 16, 8."""


@dataclass(frozen=True)
class Memory:
    """What a layer attends to: the cells of one map, or of several laid end to end."""

    values: Tensor
    """[B,S,C]"""
    keys: Tensor
    """[B,S,C]: the values with their sine positions."""
    places: Tensor
    """[S,2]: centres of the cells, (x, y) in 0..1."""
    sizes: tuple[tuple[int, int], ...]
    """(h, w) of each map."""


class DecoderLayer(nn.Module):
    """Cross- and self-attention (in either order), feed-forward network; residual and norm after each."""

    def __init__(self, config: DecoderConfig, channels: int) -> None:
        super().__init__()
        self.self_first = config.order == "self_first"
        self.cross_attn = CROSS_ATTENTIONS[config.attention](channels, config.heads, config.dropout)
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
        query_position: Tensor | float,
        memory: Memory,
        may_look: Tensor | None,
        may_talk: Tensor | None,
    ) -> Tensor:
        """x [B,Q+P,C], query_position [1,Q+P,C] or 0; may_look [B,Q+P,S] and may_talk [B,Q+P,Q+P] bool, or
        None for all cells and everyone."""
        if self.self_first:
            x = self._talk(x, query_position, may_talk)
        looked = self.cross_attn(x + query_position, memory.keys, memory.values, may_look, memory.places)
        x = self.cross_norm(x + self.dropout(looked))
        if not self.self_first:
            x = self._talk(x, query_position, may_talk)
        thought = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.ffn_norm(x + self.dropout(thought))

    def _talk(self, x: Tensor, query_position: Tensor | float, may_talk: Tensor | None) -> Tensor:
        if self.self_attn is None:
            return x
        placed = x + query_position
        return self.self_norm(x + self.dropout(self.self_attn(placed, placed, x, may_talk)))


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
    """Queries refined by looking at one memory after the other (Mask2Former section 3.2, MaskFormer 3.3).

    What a model does without is None: `query_feat` with zero features, `query_embed` without positions,
    `level_embed` and `input_proj` with the other kind of memory, `class_embed` of per-pixel models,
    `box_embed` without boxes, `pilot_embed` (class embeddings) without mask piloting.
    """

    def __init__(self, config: ModelConfig, classes: int, backbone_channels: int) -> None:
        """backbone_channels: of the memory where that is the backbone's map."""
        super().__init__()
        decoder, channels, queries = config.decoder, config.pixel_decoder.channels, config.queries(classes)
        self.levels = decoder.levels()
        self.queries = queries
        self.predicts_first = bool(decoder.heads_before_layers)
        self.masked = decoder.attention in ("masked", "mask_pooling")
        learned = decoder.query_features != "zero"
        # only layers make use of positions and levels
        positions = config.pilot.rules().query_positions and decoder.layers
        self.query_feat = nn.Embedding(queries, channels) if learned else None
        self.query_embed = nn.Embedding(queries, channels) if positions else None
        from_backbone = decoder.memory == "backbone"
        leveled = decoder.layers and not from_backbone
        self.level_embed = nn.Embedding(LEVELS, channels) if leveled else None
        self.layers = nn.ModuleList(DecoderLayer(decoder, channels) for _ in range(decoder.layers))
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
        query_position = 0.0 if self.query_embed is None else self.query_embed.weight[None]
        may_talk = None
        if pilots is not None:
            embedded = self.pilot_embed(pilots.labels.clamp(min=0))
            x = torch.cat((x, embedded * (pilots.labels >= 0)[:, :, None]), dim=1)
            if self.query_embed is not None:
                # the paper is silent on the positions of pilots: none
                query_position = F.pad(query_position, (0, 0, 0, pilots.labels.shape[1]))
            may_talk = _self_attention_rule(queries, pilots)

        read = {levels: self._memory(memories, levels) for levels in set(self.levels)}
        heads = []
        for index, (layer, levels) in enumerate(zip(self.layers, self.levels)):
            shown = all_heads and (index > 0 or self.predicts_first)
            head = self._predict(x, mask_features, whole=shown) if shown or self.masked else None
            if shown:
                heads.append(head)
            piloted = None if pilots is None else pilots.attention_masks[index]
            may_look = None
            if self.masked:
                predicted = head.mask_logits if piloted is None else head.mask_logits[:, :queries]
                may_look = _foreground(predicted, read[levels].sizes)
            if piloted is not None:
                if may_look is None:
                    may_look = piloted.new_ones(batch, queries, piloted.shape[2])
                may_look = torch.cat((may_look, piloted), dim=1)
            if may_look is not None:
                # a query whose mask is empty looks everywhere
                may_look = may_look | ~may_look.any(dim=2, keepdim=True)
            x = layer(x, query_position, read[levels], may_look, may_talk)
        heads.append(self._predict(x, mask_features, whole=True))
        if pilots is None:
            return Output(tuple(heads))
        return Output(*zip(*(_split(head, queries) for head in heads)))

    def _memory(self, maps: tuple[Tensor, ...], levels: tuple[int, ...]) -> Memory:
        values, keys, places, sizes = [], [], [], []
        for level in levels:
            value = maps[level] if self.input_proj is None else self.input_proj(maps[level])
            _, channels, h, w = value.shape
            value = value.flatten(2).transpose(1, 2)
            if self.level_embed is not None:
                value = value + self.level_embed.weight[level]
            values.append(value)
            keys.append(value + sine_position(h, w, channels, value.device, value.dtype))
            places.append(cell_centers(h, w, value.device))
            sizes.append((h, w))
        return Memory(torch.cat(values, 1), torch.cat(keys, 1), torch.cat(places), tuple(sizes))

    def _predict(self, x: Tensor, mask_features: Tensor, whole: bool) -> Head:
        """The predictions of all queries, or only their masks."""
        x = self.norm(x)
        mask_logits = mask_logits_of(self.mask_embed(x), mask_features)
        class_logits = self.class_embed(x) if whole and self.class_embed is not None else None
        boxes = self.box_embed(x).sigmoid() if whole and self.box_embed is not None else None
        return Head(class_logits, mask_logits, boxes)


class PixelClassifier(nn.Module):
    """Class maps by one convolution of the mask features: PerPixelBaseline's whole decoder (MaskFormer 4)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.levels = ()
        self.layers = ()
        self.pilot_embed = None
        self.predictor = nn.Conv2d(channels, classes, 1)

    def forward(
        self,
        mask_features: Tensor,
        memories: tuple[Tensor, ...],
        pilots: Pilots | None = None,
        all_heads: bool = True,
    ) -> Output:
        """mask_features [B,C,H/4,W/4] -> the one head; nothing else is used."""
        return Output((Head(None, self.predictor(mask_features)),))


def _split(head: Head, queries: int) -> tuple[Head, Head]:
    """The matching part's first `queries`, and the pilots."""
    sizes = (queries, head.mask_logits.shape[1] - queries)
    parts = [
        (None, None) if values is None else values.split(sizes, dim=1)
        for values in (head.class_logits, head.mask_logits, head.boxes)
    ]
    return Head(*(first for first, _ in parts)), Head(*(second for _, second in parts))


@torch.no_grad()
def _foreground(mask_logits: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Cells [B,Q,S] in which the resized mask is foreground (probability at least 0.5)."""
    resized = [F.interpolate(mask_logits, size=s, mode="bilinear", align_corners=False) for s in sizes]
    return torch.cat([r.flatten(2) for r in resized], dim=2) >= 0


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
