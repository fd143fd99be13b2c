"""Mask logits: each query's mask embedding times the mask features of each cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mask_logits_of(embeddings: Tensor, features: Tensor) -> Tensor:
    """embeddings [B,Q,C], features [B,C,h,w] -> [B,Q,h,w].

    In training most masks are in no loss: of 100 queries only as many as there are objects are matched. On a
    CPU the gradient is computed from the masks in the loss alone.
    """
    if features.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.einsum("bqc,bchw->bqhw", embeddings, features)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        embeddings, features = embeddings.to(dtype), features.to(dtype)
    return _MaskLogits.apply(embeddings, features)


class _MaskLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(embeddings, features)
        return (embeddings @ features.flatten(2)).unflatten(2, features.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, features = ctx.saved_tensors
        flat, grad = features.flatten(2), grad.flatten(2)
        grad_embeddings = torch.zeros_like(embeddings)
        grad_flat = torch.empty(flat.shape, dtype=flat.dtype)
        # a norm would give the same answer in twenty times the time
        for b, used in enumerate((grad.amax(2) != 0) | (grad.amin(2) != 0)):
            rows = used.nonzero()[:, 0]
            chosen = grad[b] if len(rows) == len(used) else grad[b, rows]
            grad_embeddings[b, rows] = chosen @ flat[b].T
            torch.mm(embeddings[b, rows].T, chosen, out=grad_flat[b])
        return grad_embeddings, grad_flat.view(features.shape)
