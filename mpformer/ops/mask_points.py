"""Mask losses on sampled points, in one pass over each predicted mask: the compiled form for CPUs.

The definition is the plain PyTorch path of `mpformer.model.losses`: candidates are looked up in the predicted
mask, the least certain of them are kept, cross-entropy and dice are taken at the kept and at uniform points.
Composed of torch's operators that moves some hundred bytes per point through memory, again for the gradient.
Here a mask and its points stay in the cache of one core, and only the kept points are stored in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpformer.ops.cpu import Library, torch_threads
from mpformer.ops.kernels import cpu_library

_PAIR = np.dtype(
    [(name, np.uint64) for name in ("logits", "mask", "candidates", "uniform", "kept", "sums", "grad")]
    + [(name, np.float32) for name in ("grad_cross_entropy", "grad_dice", "limit_x", "limit_y")]
)
"""csrc/mask_points.h, struct MaskPair."""
_SUMS = 5


class _Problem(ctypes.Structure):
    """csrc/mask_points.h, struct MaskProblem."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("launcher", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("count", "candidates", "uniform", "important")],
        *[(name, ctypes.c_int32) for name in ("height", "width", "mask_height", "mask_width")],
        *[(name, ctypes.c_int32) for name in ("threads", "instruction_set")],
    ]


@dataclass(frozen=True)
class MaskPairs:
    """The pairs of a predicted and a true mask of one image, with the random points of each pair."""

    queries: Tensor
    """[n] int64: the predicted masks, each at most once."""
    objects: Tensor
    """[n] int64: the true masks."""
    masks: Tensor
    """[N,H,W] bool: the image's true masks; of one size in all images of a call."""
    candidates: Tensor
    """[n,candidates] int32: packed points, see `mpformer.model.points.unpack`."""
    uniform: Tensor
    """[n,uniform] int32: packed points; with `rows` [m,uniform]."""
    limit: tuple[float, float] = (float("inf"), float("inf"))
    """(x, y) in 0..1: points at or beyond it do not count."""
    rows: Tensor | None = None
    """[n] int64: the row of `uniform` with each pair's points; None: its own. Neighbours of the same object
    and row are quick: their true mask is looked up once."""


def kernel_for_mask_points(mask_logits: Tensor) -> Library | None:
    """The compiled kernel for predicted masks like these, None where the plain path is to run."""
    return cpu_library(mask_logits)


def mask_point_losses(
    library: Library,
    mask_logits: Tensor,
    images: Sequence[MaskPairs],
    important: int,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and dice loss of each pair, image after image: two times [n] float32.

    mask_logits [B,Q,h,w], differentiable (once); of the candidates the `important` least certain are kept.
    `kernel` names an instruction set of the library, for tests.
    """
    return _Losses.apply(mask_logits, library, tuple(images), important, kernel)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mask_logits: Tensor,
        library: Library,
        images: tuple[MaskPairs, ...],
        important: int,
        kernel: str | None,
    ) -> tuple[Tensor, Tensor]:
        call = _Call(mask_logits, library, images, important, kernel)
        pairs = call.pairs(mask_logits)
        if important:
            pairs["candidates"] = np.concatenate([_rows(image.candidates) for image in images])
        call.run(library.mask_points_forward, pairs, mask_logits, images[0].candidates.shape[1])
        ctx.call = call
        ctx.save_for_backward(mask_logits)
        counted, cross_entropy, probability, truth, overlap = call.sums.unbind(1)
        dice = 1 - (2 * overlap + 1) / (probability + truth + 1)
        return cross_entropy / counted.clamp(min=1), dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cross_entropy: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, ...]:
        (mask_logits,) = ctx.saved_tensors
        call: _Call = ctx.call
        pairs = call.pairs(mask_logits)
        grad = torch.zeros(mask_logits.shape, dtype=torch.float32)
        pairs["grad"] = call.addresses(grad)
        pairs["grad_cross_entropy"] = grad_cross_entropy.numpy()
        pairs["grad_dice"] = grad_dice.numpy()
        call.run(call.library.mask_points_backward, pairs, mask_logits, 0)
        return grad.to(mask_logits.dtype), None, None, None, None


class _Call:
    """What forward and backward share: the pairs' places in memory, and what the forward leaves behind."""

    def __init__(
        self,
        mask_logits: Tensor,
        library: Library,
        images: tuple[MaskPairs, ...],
        important: int,
        kernel: str | None,
    ) -> None:
        self.library, self.important = library, important
        nothing = torch.empty(0, 0, dtype=torch.int32)
        # the backward pass knows the kept candidates, the others would only fill memory until then
        self.images = tuple(replace(image, candidates=nothing) for image in images)
        self.kernel = -1 if kernel is None else library.kernels.index(kernel)
        count = sum(len(image.queries) for image in images)
        self.kept = torch.empty(count, important, dtype=torch.int32)
        self.sums = torch.zeros(count, _SUMS)
        self.masks = [image.masks.contiguous() for image in images]
        self.uniform = [image.uniform.contiguous() for image in images]
        self._mask_logits: Tensor | None = None

    def addresses(self, maps: Tensor) -> np.ndarray:
        """Where the predicted mask of each pair lies in maps [B,Q,h,w]."""
        image, query = maps.stride()[:2]
        parts = [
            maps.data_ptr() + maps.element_size() * (b * image + query * pairs.queries.numpy())
            for b, pairs in enumerate(self.images)
        ]
        return np.concatenate(parts).astype(np.uint64)

    def pairs(self, mask_logits: Tensor) -> np.ndarray:
        """The table of pairs, logits to be read from mask_logits [B,Q,h,w]."""
        width = mask_logits.shape[3]
        if mask_logits.dtype != torch.float32 or mask_logits.stride()[2:] != (width, 1):
            mask_logits = mask_logits.float().contiguous()
        self._mask_logits = mask_logits  # lives as long as its address is used
        pairs = np.zeros(len(self.sums), _PAIR)
        pairs["logits"] = self.addresses(mask_logits)
        pairs["kept"] = _rows(self.kept)
        pairs["sums"] = _rows(self.sums)
        pairs["mask"] = np.concatenate(
            [_rows(masks)[image.objects.numpy()] for masks, image in zip(self.masks, self.images)]
        )
        pairs["uniform"] = np.concatenate(
            [
                _rows(uniform) if image.rows is None else _rows(uniform)[image.rows.numpy()]
                for uniform, image in zip(self.uniform, self.images)
            ]
        )
        counts = [len(image.queries) for image in self.images]
        for axis, name in enumerate(("limit_x", "limit_y")):
            pairs[name] = np.repeat([image.limit[axis] for image in self.images], counts)
        return pairs

    def run(self, function: Any, pairs: np.ndarray, mask_logits: Tensor, candidates: int) -> None:
        height, width = mask_logits.shape[2:]
        mask_height, mask_width = self.masks[0].shape[1:]
        problem = _Problem(
            pairs=pairs.ctypes.data,
            launcher=torch_threads(),
            count=len(pairs),
            candidates=candidates,
            uniform=self.uniform[0].shape[1],
            important=self.important,
            height=height,
            width=width,
            mask_height=mask_height,
            mask_width=mask_width,
            threads=torch.get_num_threads(),
            instruction_set=self.kernel,
        )
        status = function(ctypes.addressof(problem)) if len(pairs) else 0
        self._mask_logits = None
        if status == 1:
            raise MemoryError("mask losses: no memory for the CPU kernel's scratch")
        if status != 0:
            raise RuntimeError("mask losses: this processor cannot run the kernel that was asked for")


def _rows(tensor: Tensor) -> np.ndarray:
    """The address of each row of a contiguous tensor."""
    step = tensor.stride(0) * tensor.element_size()
    return (tensor.data_ptr() + step * np.arange(len(tensor))).astype(np.uint64)
