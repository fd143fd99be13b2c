"""Mask losses on sampled points and random numbers on the CPU: the way to csrc/mask_points_cpu.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpformer.ops.mask_pairs import SUMS, MaskPairs, Points
from mpformer.ops.threads import torch_threads

_PAIR = np.dtype(
    [(name, np.uint64) for name in ("logits", "mask", "kept", "sums", "grad")]
    + [(name, np.float32) for name in ("grad_cross_entropy", "grad_dice", "limit_x", "limit_y")]
    + [("stream", np.int32, 4)]
)
"""csrc/mask_points.h, struct MaskPair."""


class _MaskProblem(ctypes.Structure):
    """csrc/mask_points.h, struct MaskProblem."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("launcher", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("count", "candidates", "uniform", "important")],
        *[(name, ctypes.c_int32) for name in ("height", "width", "mask_height", "mask_width")],
        *[(name, ctypes.c_int32) for name in ("threads", "instruction_set")],
    ]


class CpuPoints:
    """`mask_points.PointKernel` of the compiled library, by its best instruction set unless one is named."""

    def __init__(self, function: Callable[..., Callable[..., Any]], instruction_set: int = -1) -> None:
        """function: of the library, by name, result and arguments."""
        sizes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p)
        self._random = function("random_bits", None, *sizes)
        self._forward = function("mask_points_forward", ctypes.c_int, ctypes.POINTER(_MaskProblem))
        self._backward = function("mask_points_backward", ctypes.c_int, ctypes.POINTER(_MaskProblem))
        self._instruction_set = instruction_set

    def random_bits(self, streams: Tensor, call: int, count: int) -> Tensor:
        streams = streams.contiguous()
        result = torch.empty(len(streams), count, dtype=torch.int32)
        self._random(streams.data_ptr(), len(streams), call, count, result.data_ptr())
        return result

    def forward(
        self, maps: Sequence[Tensor], pairs: MaskPairs, points: Points
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(pairs.table)
        chosen = torch.empty(count if pairs.kept is None else 0, points.important, dtype=torch.int32)
        sums = torch.empty(count, SUMS)
        maps = _readable(maps)
        candidates = points.candidates if pairs.kept is None else 0
        self._run(self._forward, _table(maps, pairs, sums, chosen), maps, pairs, points, candidates)
        counted, cross_entropy, probability, truth, overlap = sums.unbind(1)
        dice = 1 - (2 * overlap + 1) / (probability + truth + 1)
        return torch.stack((cross_entropy / counted.clamp(min=1), dice)), sums, chosen

    def backward(
        self,
        grad: Tensor,
        maps: Sequence[Tensor],
        pairs: MaskPairs,
        points: Points,
        sums: Tensor,
        kept: Tensor,
    ) -> list[Tensor]:
        dtype, maps = maps[0].dtype, _readable(maps)
        grads = [torch.zeros(one.shape, dtype=torch.float32) for one in maps]
        table = _table(maps, pairs, sums, kept)
        table["grad"] = _addresses(grads, pairs.table.numpy())
        table["grad_cross_entropy"], table["grad_dice"] = grad.numpy()
        self._run(self._backward, table, maps, pairs, points, 0)
        return [one.to(dtype) for one in grads]

    def _run(
        self,
        function: Callable[..., int],
        table: np.ndarray,
        maps: Sequence[Tensor],
        pairs: MaskPairs,
        points: Points,
        candidates: int,
    ) -> None:
        # neighbours with the same true mask and stream are quick: both are looked up once
        table = table[np.lexsort((pairs.table[:, 4].numpy(), pairs.table[:, 3].numpy()))]
        problem = _MaskProblem(
            pairs=table.ctypes.data,
            launcher=torch_threads(),
            count=len(table),
            candidates=candidates,
            uniform=points.uniform,
            important=points.important,
            height=maps[0].shape[2],
            width=maps[0].shape[3],
            mask_height=pairs.masks.shape[1],
            mask_width=pairs.masks.shape[2],
            threads=torch.get_num_threads(),
            instruction_set=self._instruction_set,
        )
        _check(function(ctypes.byref(problem)))


def _table(maps: Sequence[Tensor], pairs: MaskPairs, sums: Tensor, chosen: Tensor) -> np.ndarray:
    """What the library is told of each pair."""
    if not pairs.masks.is_contiguous() or not (pairs.kept is None or pairs.kept.is_contiguous()):
        raise ValueError("mask losses: true masks and kept points have to be contiguous")
    rows = pairs.table.numpy()
    table = np.zeros(len(rows), _PAIR)
    table["logits"] = _addresses(maps, rows)
    table["mask"] = _rows(pairs.masks)[rows[:, 3]]
    table["kept"] = _rows(chosen) if pairs.kept is None else _rows(pairs.kept)[rows[:, 4]]
    table["sums"] = _rows(sums)
    table["stream"] = pairs.streams.numpy()[rows[:, 4]]
    limits = np.inf if pairs.limits is None else pairs.limits.numpy().T
    table["limit_x"], table["limit_y"] = np.broadcast_to(limits, (2, len(rows)))
    return table


def _addresses(maps: Sequence[Tensor], rows: np.ndarray) -> np.ndarray:
    """Where the predicted mask of each pair lies."""
    starts = np.array([one.data_ptr() for one in maps], np.uint64)
    strides = np.array([one.stride()[:2] for one in maps], np.int64) * maps[0].element_size()
    inside = (strides[rows[:, 0]] * rows[:, 1:3]).sum(1)
    return starts[rows[:, 0]] + inside.astype(np.uint64)


def _rows(tensor: Tensor) -> np.ndarray:
    """The address of each row of a contiguous tensor."""
    step = tensor.stride(0) * tensor.element_size()
    return (tensor.data_ptr() + step * np.arange(len(tensor))).astype(np.uint64)


def _readable(maps: Sequence[Tensor]) -> list[Tensor]:
    """float32, each map of one query contiguous."""
    inner = (maps[0].shape[3], 1)
    plain = (one.dtype == torch.float32 and one.stride()[2:] == inner for one in maps)
    return [one if as_is else one.float().contiguous() for one, as_is in zip(maps, plain)]


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("mask losses: no memory for the CPU kernel's scratch")
    if status != 0:
        raise RuntimeError("mask losses: this processor cannot run the kernel that was asked for")
