"""The CUDA kernels of csrc/mask_points.cu: mask losses on sampled points, and random numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpformer.ops import nvrtc
from mpformer.ops.build import SOURCES
from mpformer.ops.mask_pairs import SUMS, MaskPairs, Points
from mpformer.ops.nvrtc import Launches

# csrc/mask_points.cu
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS = 1024
_MAPS = 32
_STATIC = 10 * 1024  # bytes of shared memory that the kernels have beside what they ask for
_LOW_BITS = 13  # at least, of the lower word of fixed-point numbers: then they have 24 bits, as a float has


class PointVariant(NamedTuple):
    """The constants that one compilation of the source is for; the names are those of its macros."""

    VALUE_TYPE: int
    STAGED: int
    REMEMBERED: int

    def defines(self) -> list[tuple[str, int]]:
        """Name and value of every macro."""
        return list(self._asdict().items())


class CudaPoints:
    """`mpformer.ops.mask_points.PointKernel` on one device, given what compiles a variant for it and how many
    bytes of shared memory a block may have."""

    def __init__(self, load: Callable[[PointVariant], Launches], shared_memory: int):
        self._load = lru_cache(maxsize=None)(load)
        self._shared = shared_memory - _STATIC

    def compile_one(self) -> None:
        """Raises CudaError where the kernels do not compile."""
        self._load(PointVariant(0, 0, 0))

    def random_bits(self, streams: Tensor, call: int, count: int) -> Tensor:
        """As `mpformer.ops.random_bits`."""
        streams, rows = streams.contiguous(), len(streams)
        numbers = streams.new_empty(rows, count)
        blocks = -(-rows * -(-count // 4) // _THREADS)
        numbers_of = [ctypes.c_int(number) for number in (call, count, rows)]
        arguments = [ctypes.c_void_p(t.data_ptr()) for t in (streams, numbers)]
        self._load(PointVariant(0, 0, 0)).launch("random_bits", blocks, _THREADS, [*arguments, *numbers_of])
        return numbers

    def forward(
        self, maps: Sequence[Tensor], pairs: MaskPairs, points: Points
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [2,n] float32, sums [n,5] float32 and the kept points [n,important] int32."""
        count, table = len(pairs.table), pairs.table
        losses = table.new_empty(2, count, dtype=torch.float32)
        sums = table.new_empty(count, SUMS, dtype=torch.float32)
        chosen = table.new_empty(count if pairs.kept is None else 0, points.important)
        call = _Call(maps, pairs, points, self._shared)
        call.set(losses=losses, sums=sums, chosen=chosen)
        self._load(call.variant).launch(
            "mask_points_forward", count, _THREADS, [call.problem], call.forward_shared
        )
        return losses, sums, chosen

    def backward(
        self,
        grad: Tensor,
        maps: Sequence[Tensor],
        pairs: MaskPairs,
        points: Points,
        sums: Tensor,
        kept: Tensor,
    ) -> list[Tensor]:
        """Gradients of the maps, contiguous; every element is written once.

        That of a map is not a number all over if its losses are not finite.
        """
        grads = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in maps]
        call = _Call(maps, pairs, points, self._shared)
        pair_of = _pair_of(maps, pairs.table)
        call.set(grad=grad.contiguous(), sums=sums, chosen=kept, pair_of=pair_of)
        for i, one in enumerate(grads):
            call.problem.grad_maps[i] = one.data_ptr()
        shared = call.bands(self._shared)
        self._load(call.variant).launch(
            "mask_points_backward", len(pair_of), _THREADS, [call.problem], shared
        )
        return grads


def _pair_of(maps: Sequence[Tensor], table: Tensor) -> Tensor:
    """The number of the pair of each predicted mask, -1 where there is none: [maps * B * Q] int32."""
    images, queries = maps[0].shape[:2]
    numbers = table.new_full((len(maps) * images * queries,), -1)
    place = (table[:, 0] * images + table[:, 1]) * queries + table[:, 2]
    numbers[place] = torch.arange(len(table), dtype=table.dtype, device=table.device)
    return numbers


class _Problem(ctypes.Structure):
    """csrc/mask_points.cu, struct Problem."""

    _fields_ = [
        *[(name, ctypes.c_void_p * _MAPS) for name in ("maps", "grad_maps")],
        *[(name, ctypes.c_longlong * _MAPS) for name in ("image_stride", "query_stride")],
        *[(name, ctypes.c_void_p) for name in ("table", "masks", "streams", "limits", "given", "chosen")],
        *[(name, ctypes.c_void_p) for name in ("losses", "sums", "grad", "pair_of")],
        *[(name, ctypes.c_int) for name in ("pairs", "images", "queries")],
        *[(name, ctypes.c_int) for name in ("height", "width", "mask_height", "mask_width")],
        *[(name, ctypes.c_int) for name in ("candidates", "important", "uniform", "band", "low_bits")],
    ]


class _Call:
    """Inputs of one call as the kernels want them, kept until they are launched."""

    def __init__(self, maps: Sequence[Tensor], pairs: MaskPairs, points: Points, shared: int):
        chooses = pairs.kept is None and points.important > 0
        if len(maps) > _MAPS:
            raise ValueError(f"mask losses of {len(maps)} heads at once, the CUDA kernels take up to {_MAPS}")
        if chooses and points.important > points.candidates:
            raise ValueError(f"{points.important} points to be kept of {points.candidates} candidates")
        self.problem = _Problem()
        self._alive: list[Tensor | None] = []
        images, queries, height, width = maps[0].shape
        for i, one in enumerate(maps):
            one = one if one.stride()[2:] == (width, 1) else one.contiguous()
            self._alive.append(one)
            self.problem.maps[i] = one.data_ptr()
            self.problem.image_stride[i], self.problem.query_stride[i] = one.stride()[:2]
        limits = None if pairs.limits is None else pairs.limits.contiguous()
        given = None if pairs.kept is None else pairs.kept.contiguous()
        table, masks, streams = (t.contiguous() for t in (pairs.table, pairs.masks, pairs.streams))
        self.set(table=table, masks=masks, streams=streams, limits=limits, given=given)
        self.problem.pairs = len(table)
        self.problem.images, self.problem.queries = images, queries
        self.problem.height, self.problem.width = height, width
        self.problem.mask_height, self.problem.mask_width = masks.shape[1:]
        self.problem.candidates = points.candidates
        self.problem.important, self.problem.uniform = points.important, points.uniform

        mask = -(-height * width * maps[0].element_size() // 16) * 16
        staged = mask <= shared
        self.forward_shared = mask if staged else 0
        remembered = -(-points.candidates // 4) * 16
        remembers = chooses and self.forward_shared + remembered <= shared
        self.forward_shared += remembered if remembers else 0
        self.variant = PointVariant(_TYPES[maps[0].dtype], int(staged), int(remembers))

    def set(self, **tensors: Tensor | None) -> None:
        """Pointers of the problem, by name."""
        for name, tensor in tensors.items():
            self._alive.append(tensor)
            setattr(self.problem, name, None if tensor is None else tensor.data_ptr())

    def bands(self, shared: int) -> int:
        """Divides the gradient into bands of rows for the backward pass; returns the bytes that one takes."""
        height, width = self.problem.height, self.problem.width
        rows = min(height, shared // (8 * width))
        if rows == 0:
            raise ValueError(f"predicted masks are {width} wide, the CUDA kernels take {shared // 8}")
        self.problem.band = -(-height // -(-height // rows))
        # a sum has one term of each point at most, and room for 2^(32 - low_bits) of them
        points = self.problem.important + self.problem.uniform
        self.problem.low_bits = 32 - max(1, (points - 1).bit_length())
        if self.problem.low_bits < _LOW_BITS:
            raise ValueError(f"{points} points for a mask, the CUDA kernels take {2 ** (32 - _LOW_BITS)}")
        return 8 * width * self.problem.band


def cuda_points(architecture: int, device: int) -> CudaPoints:
    """The kernels for one GPU. Raises CudaError, here and later, where they do not compile."""
    source = SOURCES / "mask_points.cu"
    text = source.read_text()

    def load(variant: PointVariant) -> nvrtc.Module:
        code = nvrtc.compile_source(text, architecture, variant.defines(), source.name)
        return nvrtc.Module(code, device)

    return CudaPoints(load, nvrtc.shared_memory_per_block(device))
