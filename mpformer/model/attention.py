"""What a query does with the memory or with other queries: attention, with masks shared by all heads.

`Attention` serves everywhere; `ModulatedAttention` (SMCA) and `MaskPooling` (K-Net) are alternatives for the
cross-attention of Mask2Former's Table 4c, called alike.
"""

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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """query [B,Q,C], key and value [B,S,C] -> [B,Q,C].

        `allowed` [B or 1,Q,S] bool: True where a query may look; each row must allow something, since a row
        without any allowed key has no defined softmax. `places` [S,2]: where the keys lie, (x, y) in 0..1.
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
            attn_mask=self._mask(query, allowed, places),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def weights(
        self, query: Tensor, key: Tensor, allowed: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """The attention that `forward` pays, [B,Q,S], mean over the heads; for diagnostics, rows sum to 1."""
        q_weight, k_weight, _ = self.in_proj_weight.chunk(3)
        q_bias, k_bias, _ = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(query, q_weight, q_bias))
        k = self._split(F.linear(key, k_weight, k_bias))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mask = self._mask(query, allowed, places)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).mean(1)

    def _mask(self, query: Tensor, allowed: Tensor | None, places: Tensor | None) -> Tensor | None:
        """What `scaled_dot_product_attention` takes: bool, or float to be added; [B,1 or M,Q,S]."""
        return None if allowed is None else allowed[:, None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ModulatedAttention(Attention):
    """Attention under a Gaussian around a place that each query chooses (SMCA, Gao et al. 2021).

    A query predicts one centre, and for each head an offset from it and a width and height; the logarithm of
    the Gaussian is added to the scores. Widths are exponentials, so never zero (ours); they start at 1, the
    size of the map.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, dropout)
        self.center = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 2))
        self.spread = nn.Linear(channels, heads * 4)
        nn.init.zeros_(self.spread.weight)
        nn.init.zeros_(self.spread.bias)

    def _mask(self, query: Tensor, allowed: Tensor | None, places: Tensor | None) -> Tensor:
        center = self.center(query).float().sigmoid()[:, None, :, :]  # [B,1,Q,2]
        offset, log_size = self._split(self.spread(query).float()).chunk(2, dim=3)  # [B,M,Q,2] each
        # the Gaussian is a product over x and y, its logarithm a sum
        by_axis = ((places - (center + offset)[:, :, :, None, :]) / log_size.exp()[:, :, :, None, :]) ** 2
        bias = -by_axis.sum(4).to(query.dtype)
        return bias if allowed is None else bias.masked_fill(~allowed[:, None], float("-inf"))


class MaskPooling(nn.Module):
    """The mean of the memory within each query's mask, as in K-Net (Zhang et al. 2021): uniform attention."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.value_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        for projection in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, places: Tensor | None = None
    ) -> Tensor:
        """As `Attention.forward`; of query and key nothing is used."""
        pooled = self.weights(query, key, allowed).to(value.dtype) @ value
        return self.out_proj(self.value_proj(pooled))

    @torch.no_grad()
    def weights(self, query: Tensor, key: Tensor, allowed: Tensor, places: Tensor | None = None) -> Tensor:
        """[B,Q,S], rows sum to 1."""
        return allowed.to(query.dtype) / allowed.sum(2, keepdim=True)


CROSS_ATTENTIONS = {
    "masked": Attention,
    "cross": Attention,
    "smca": ModulatedAttention,
    "mask_pooling": MaskPooling,
}
"""By `decoder.attention`."""
