"""Attention of queries to the memory and among each other, with masks shared by all heads.

`Attention` is used everywhere; `ModulatedAttention` (SMCA) and `MaskPooling` (K-Net) are alternatives for the
cross-attention (Mask2Former Table 4c).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer import plugin
from mpformer.config.model import Decoder as DecoderConfig
from mpformer.config.plugins import Plugin


class CrossAttention(nn.Module, ABC):
    """The contract of the attention to the memory, which `model.decoder.attention` names.

    A plug-in is a subclass, made with (channels, heads, dropout) and its options.
    """

    predicted_masks = False
    """Whether a query may attend to the foreground of its own predicted mask only (masked attention)."""

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        """query [B,Q,C], key and value [B,S,C] -> [B,Q,C].

        mask [B or 1,Q,S] bool: True where a query may attend, in each row at least once, since the softmax of
        nothing is not defined; None: everywhere, which with `predicted_masks` never occurs. centers [S,2]
        float32: centres of the keys' cells, (x, y) in 0..1; always given by the decoder.
        """

    @abstractmethod
    def weights(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        """The attention that `forward` pays, [B,Q,S], rows sum to 1; for diagnostics, without a gradient."""


class Attention(CrossAttention):
    """Multi-head attention whose keys and values may come from different tensors.

    Parameters have the layout of `torch.nn.MultiheadAttention` (one fused input projection), so its weights
    can be copied over.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(query, q_weight, q_bias))
        k = self._split(F.linear(key, k_weight, k_bias))
        v = self._split(F.linear(value, v_weight, v_bias))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._attention_mask(query, mask, centers),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def weights(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        """The mean over the heads."""
        q_weight, k_weight, _ = self.in_proj_weight.chunk(3)
        q_bias, k_bias, _ = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(query, q_weight, q_bias))
        k = self._split(F.linear(key, k_weight, k_bias))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        added = self._attention_mask(query, mask, centers)
        if added is not None:
            scores = (
                scores.masked_fill(~added, float("-inf")) if added.dtype == torch.bool else scores + added
            )
        return scores.softmax(-1).mean(1)

    def _attention_mask(self, query: Tensor, mask: Tensor | None, centers: Tensor | None) -> Tensor | None:
        """The mask for `scaled_dot_product_attention`: bool, or float to be added; [B,1 or M,Q,S]."""
        return None if mask is None else mask[:, None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class MaskedAttention(Attention):
    """Attention within the query's predicted mask (Mask2Former section 3.2.1)."""

    predicted_masks = True


class ModulatedAttention(Attention):
    """Attention under a Gaussian around a centre that each query predicts (SMCA, Gao et al. 2021).

    A query predicts one centre, and for each head an offset from it and a width and height; the logarithm of
    the Gaussian is added to the scores. Sizes are exponentials, never zero (our choice), and start at 1, the
    size of the map.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, dropout)
        self.center = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 2))
        self.spread = nn.Linear(channels, heads * 4)
        nn.init.zeros_(self.spread.weight)
        nn.init.zeros_(self.spread.bias)

    def _attention_mask(self, query: Tensor, mask: Tensor | None, centers: Tensor | None) -> Tensor:
        if centers is None:
            raise ValueError("the centres of the keys are expected")
        center = self.center(query).float().sigmoid()[:, None, :, :]  # [B,1,Q,2]
        offset, log_size = self._split(self.spread(query).float()).chunk(2, dim=3)  # [B,M,Q,2] each
        # the Gaussian is a product over x and y, its logarithm a sum
        by_axis = ((centers - (center + offset)[:, :, :, None, :]) / log_size.exp()[:, :, :, None, :]) ** 2
        bias = -by_axis.sum(4).to(query.dtype)
        return bias if mask is None else bias.masked_fill(~mask[:, None], float("-inf"))


class MaskPooling(CrossAttention):
    """The mean of the memory within each query's mask, as in K-Net (Zhang et al. 2021): uniform attention."""

    predicted_masks = True

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.value_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        for projection in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        """As the contract has it; query and key are not used."""
        pooled = self.weights(query, key, mask).to(value.dtype) @ value
        return self.out_proj(self.value_proj(pooled))

    @torch.no_grad()
    def weights(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        if mask is None:
            raise ValueError("mask pooling needs the predicted masks")
        return mask.to(query.dtype) / mask.sum(2, keepdim=True)


CROSS_ATTENTIONS: dict[str, type[CrossAttention]] = {
    "masked": MaskedAttention,
    "cross": Attention,
    "smca": ModulatedAttention,
    "mask_pooling": MaskPooling,
}
"""By `decoder.attention`."""


def build_cross_attention(config: DecoderConfig, channels: int) -> CrossAttention:
    """The cross-attention of the settings; `InputError` for a plug-in that does not keep the contract."""
    arguments = (channels, config.heads, config.dropout)
    named = config.attention
    if not isinstance(named, Plugin):
        return CROSS_ATTENTIONS[named](*arguments)
    place = "model.decoder.attention"
    return plugin.build(named.kind, named.options, CrossAttention, place, *arguments)


@contextlib.contextmanager
def recorded_weights(attentions: Iterable[CrossAttention]) -> Iterator[list[Tensor]]:
    """The weights [B,Q,S] of each call of an attention in the meantime, in the order of the calls."""
    seen: list[Tensor] = []

    def record(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(attention, CrossAttention)  # hooked below
        query, key, _, *rest = inputs
        seen.append(attention.weights(query, key, *rest))

    hooks = [attention.register_forward_pre_hook(record) for attention in attentions]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
