"""The compiled CPU kernel: tensors in, a call through the plain C interface of csrc/, tensors out."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpformer.ops.mask_points_cpu import CpuPoints
from mpformer.ops.reference import Shapes
from mpformer.ops.threads import torch_threads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Array(ctypes.Structure):
    """csrc/deform_attn_cpu.h, struct Array."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


_ARRAYS = ("value", "reference", "points", "weights", "output", "grad_value", "grad_points", "grad_weights")
_SIZES = ("batch", "queries", "heads", "channels", "levels", "points_per_level")


class _Problem(ctypes.Structure):
    """csrc/deform_attn_cpu.h, struct Problem."""

    _fields_ = [
        *[(name, _Array) for name in _ARRAYS],
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        ("launcher", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in _SIZES],
        ("threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


class OtherSourcesError(Exception):
    """The library was built from other sources than those that lie beside this file."""


class Library:
    """The shared library at `path`, built from csrc/; `name` is the instruction set it uses here.

    Raises OSError where it does not load, OtherSourcesError where it was built from sources of another hash.
    """

    def __init__(self, path: str, source_hash: str):
        self._library = ctypes.CDLL(path)
        # first of all: a library of other sources may lack the other functions
        if self._function("deform_attn_source", ctypes.c_char_p)().decode() != source_hash:
            raise OtherSourcesError
        self._forward = self._function("deform_attn_forward", ctypes.c_int, ctypes.POINTER(_Problem))
        self._backward = self._function("deform_attn_backward", ctypes.c_int, ctypes.POINTER(_Problem))
        self.points = CpuPoints(self._function)
        name = self._function("deform_attn_kernel", ctypes.c_char_p, ctypes.c_int)
        runs_here = self._function("deform_attn_runs_here", ctypes.c_int, ctypes.c_int)
        self.kernels: list[str] = []
        while (found := name(len(self.kernels))) is not None:
            self.kernels.append(found.decode())
        self.usable = [k for i, k in enumerate(self.kernels) if runs_here(i)]
        self.name = self.usable[-1]

    def points_of(self, kernel: str) -> CpuPoints:
        """The mask losses and random numbers of an instruction set, for tests."""
        return CpuPoints(self._function, self.kernels.index(kernel))

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(self._library, f"mpformer_{name}")
        function.restype, function.argtypes = result, arguments
        return function

    def forward(
        self,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor | None,
        points: Tensor,
        weights: Tensor,
        kernel: str | None = None,
    ) -> Tensor:
        """`ms_deform_attn`, or the fused form if `reference` is given; arguments as there, not empty."""
        batch, queries, heads = weights.shape[:3]
        output = value.new_empty(batch, queries, heads, value.shape[-1])
        self._call(self._forward, shapes, value, reference, points, weights, output, (), kernel)
        return output.flatten(2)

    def backward(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor | None,
        points: Tensor,
        weights: Tensor,
        kernel: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of value, points and weights, given that of the output, [B, Q, heads * D]."""
        grad = grad.unflatten(-1, (value.shape[2], value.shape[3]))
        grads = (
            torch.empty(value.shape, dtype=value.dtype),
            torch.empty(points.shape, dtype=torch.float32),
            torch.empty(weights.shape, dtype=torch.float32),
        )
        self._call(self._backward, shapes, value, reference, points, weights, grad, grads, kernel)
        return grads[0], grads[1].to(points.dtype), grads[2].to(weights.dtype)

    def _call(
        self,
        function: Callable[..., int],
        shapes: Shapes,
        value: Tensor,
        reference: Tensor | None,
        points: Tensor,
        weights: Tensor,
        output: Tensor,
        grads: Sequence[Tensor],
        kernel: str | None,
    ) -> None:
        batch, queries, heads, levels, points_per_level = weights.shape
        given = [_rows(t) for t in (value, points, weights, output)]
        flat_shapes = [side for shape in shapes for side in shape]
        problem = _Problem(
            value=_array(given[0]),
            points=_array(given[1]),
            weights=_array(given[2]),
            output=_array(given[3]),
            shapes=(ctypes.c_int64 * len(flat_shapes))(*flat_shapes),
            launcher=torch_threads(),
            batch=batch,
            queries=queries,
            heads=heads,
            channels=value.shape[-1],
            levels=levels,
            points_per_level=points_per_level,
            threads=torch.get_num_threads(),
            instruction_set=-1 if kernel is None else self.kernels.index(kernel),
        )
        if reference is not None:
            reference = _rows(reference.expand(batch, -1, -1, -1).unsqueeze(2))  # one head serves all
            problem.reference = _array(reference)
        for name, tensor in zip(_ARRAYS[5:], grads, strict=False):
            setattr(problem, name, _array(tensor))
        status = function(ctypes.byref(problem))
        if status == 1:
            raise MemoryError("ms_deform_attn: no memory for the CPU kernel's copy of the value maps")
        if status != 0:
            raise RuntimeError(f"ms_deform_attn: this processor cannot run the kernel {kernel!r}")


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if everything after the head dimension is contiguous, else a contiguous copy."""
    if tensor.dtype not in _TYPES:
        tensor = tensor.float()
    expected = 1
    for size, stride in zip(reversed(tensor.shape[3:]), reversed(tensor.stride()[3:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _array(tensor: Tensor) -> _Array:
    return _Array(tensor.data_ptr(), *tensor.stride()[:3], _TYPES[tensor.dtype])
