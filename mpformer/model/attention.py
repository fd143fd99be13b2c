"""Multi-head attention by `scaled_dot_product_attention`, with masks shared by all heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query [B,Q,C], key and value [B,S,C] -> [B,Q,C].

        `allowed` [B or 1,Q,S] bool: True where a query may look; each row must allow something, since a row
        without any allowed key has no defined softmax.
        """
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(query, q_weight, q_bias))
        k = self._split(F.linear(key, k_weight, k_bias))
        v = self._split(F.linear(value, v_weight, v_bias))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if allowed is None else allowed[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def weights(self, query: Tensor, key: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The attention that `forward` pays, [B,Q,S], mean over the heads; for diagnostics, rows sum to 1."""
        q_weight, k_weight, _ = self.in_proj_weight.chunk(3)
        q_bias, k_bias, _ = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(query, q_weight, q_bias))
        k = self._split(F.linear(key, k_weight, k_bias))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], float("-inf"))
        return scores.softmax(-1).mean(1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
