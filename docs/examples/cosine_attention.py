"""A cross-attention: one head whose scores are cosines of queries and keys, within the predicted masks.

model.decoder.attention: {kind: cosine_attention:CosineAttention, options: {temperature: 0.1}}
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.model.attention import CrossAttention


class CosineAttention(CrossAttention):
    predicted_masks = True

    def __init__(self, channels: int, heads: int, dropout: float, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: a positive number is expected, not {temperature}")
        self.temperature = temperature
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        return self._weights(query, key, mask) @ self.value(value)

    @torch.no_grad()
    def weights(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        return self._weights(query, key, mask)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        q, k = F.normalize(self.query(query), dim=2), F.normalize(self.key(key), dim=2)
        scores = q @ k.transpose(1, 2) / self.temperature
        return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(2)
