"""The CUDA kernels of csrc/deform_attn.cu: constants, memory and launches."""

import ctypes
import itertools
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mpformer.ops import nvrtc
from mpformer.ops.build import SOURCES
from mpformer.ops.mask_points_cuda import CudaPoints, cuda_points
from mpformer.ops.nvrtc import Argument, Launches
from mpformer.ops.reference import Shapes

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS = 256  # per block, as in __launch_bounds__
_LIMIT = 2**26  # rows of value that the packed corner index of the kernels can count


@dataclass(frozen=True)
class Variant:
    """The constants that one compilation of the source is for; the names are those of its macros."""

    VALUE_TYPE: int
    POINT_TYPE: int
    WEIGHT_TYPE: int
    CHANNELS: int
    LEVELS: int
    POINTS: int
    FUSED: int
    VEC: int
    LANES: int

    def defines(self) -> list[tuple[str, int]]:
        """Name and value of every macro."""
        return list(zip((f.name for f in fields(self)), astuple(self), strict=True))


def lanes_of(channels: int, element_size: int) -> tuple[int, int]:
    """Channels per lane and lanes per head: words of 16 bytes if they divide the head among four lanes."""
    vec = 16 // element_size
    while vec > 1 and (channels % vec or channels // vec < 4):
        vec //= 2
    lanes = 4
    while lanes < 32 and lanes * vec < channels:
        lanes *= 2
    return vec, lanes


class CudaKernel:
    """The operator on one device, given what compiles a variant for it and what makes the other operators."""

    def __init__(
        self,
        architecture: int,
        load: Callable[[Variant], Launches],
        make_points: Callable[[], CudaPoints],
    ):
        self.name = f"sm_{architecture}"
        self._architecture = architecture
        self._load = lru_cache(maxsize=None)(load)
        self._make_points = make_points

    @cached_property
    def points(self) -> CudaPoints:
        """Mask losses and random numbers on that device."""
        return self._make_points()

    def forward(
        self, value: Tensor, shapes: Shapes, reference: Tensor | None, points: Tensor, weights: Tensor
    ) -> Tensor:
        """As mpformer.ops.deform_attn; the tensors are not empty."""
        call = _Call(value, shapes, reference, points, weights)
        output = call.value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])
        arguments: list[Argument] = [*call.inputs(), _pointer(output), call.sizes]
        self._load(call.variant).launch("deform_attn_forward", call.blocks(call.pairs), _THREADS, arguments)
        return output

    def backward(
        self,
        grad: Tensor,
        value: Tensor,
        shapes: Shapes,
        reference: Tensor | None,
        points: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of value, points and weights.

        From sm_90 on the gradient of value is summed in float by vector additions to memory, whose order
        changes from run to run. `torch.use_deterministic_algorithms(True)`, an older GPU or an odd head size
        select the other form: points are sorted by the cell they lie in and every row collects its own.
        """
        call = _Call(value, shapes, reference, points, weights)
        code, sizes = self._load(call.variant), call.sizes
        grad = _ready(grad.to(value.dtype))
        grad_points, grad_weights = torch.empty_like(call.points), torch.empty_like(call.weights)
        outputs = [_pointer(grad_points), _pointer(grad_weights)]
        inputs = [_pointer(grad), *call.inputs(), *outputs]

        vector_add = self._architecture >= 90 and call.variant.VEC > 1
        if vector_add and not torch.are_deterministic_algorithms_enabled():
            total = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
            added: list[Argument] = [*inputs, _pointer(total), sizes]
            code.launch("deform_attn_backward_add", call.blocks(call.pairs), _THREADS, added)
            grad_value = total.to(value.dtype)
        else:
            cells = torch.empty(weights.numel(), dtype=torch.int32, device=value.device)
            records = torch.empty(weights.numel(), 4, dtype=torch.float32, device=value.device)
            recorded: list[Argument] = [*inputs, _pointer(cells), _pointer(records), sizes]
            code.launch("deform_attn_backward_record", call.blocks(call.pairs), _THREADS, recorded)
            cells, order = torch.sort(cells, stable=True)
            every = torch.arange(call.cells + 1, dtype=torch.int32, device=value.device)
            first = torch.searchsorted(cells, every, out_int32=True)
            grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            collected = [_pointer(t) for t in (grad, first, order, records, grad_value)]
            owners = value.shape[0] * value.shape[1] * value.shape[2]
            code.launch("deform_attn_backward_value", call.blocks(owners), _THREADS, [*collected, sizes])
        return grad_value, grad_points.to(points.dtype), grad_weights.to(weights.dtype)


class _Call:
    """Inputs of one call as the kernels want them: contiguous, aligned, counted."""

    def __init__(
        self, value: Tensor, shapes: Shapes, reference: Tensor | None, points: Tensor, weights: Tensor
    ):
        batch, rows, heads, channels = value.shape
        levels, points_per_level = weights.shape[3:]
        self.value, self.points, self.weights = _ready(value), _ready(points), _ready(weights)
        self.reference = None if reference is None else _ready(reference.float())
        vec, lanes = lanes_of(channels, value.element_size())
        self.variant = Variant(
            VALUE_TYPE=_TYPES[self.value.dtype],
            POINT_TYPE=_TYPES[self.points.dtype],
            WEIGHT_TYPE=_TYPES[self.weights.dtype],
            CHANNELS=channels,
            LEVELS=levels,
            POINTS=points_per_level,
            FUSED=int(reference is not None),
            VEC=vec,
            LANES=lanes,
        )
        cells = [(h + 1) * (w + 1) for h, w in shapes]
        self.pairs = batch * weights.shape[1] * heads
        self.cells = batch * heads * sum(cells)
        if max(rows, self.pairs * lanes // _THREADS, self.cells // 32, weights.numel() // 32) >= _LIMIT:
            raise ValueError(
                f"value {list(value.shape)} with {weights.numel()} samples is too large for the CUDA kernels"
            )
        self.sizes = _sizes_type(levels)(
            height=_ints(h for h, _ in shapes),
            width=_ints(w for _, w in shapes),
            start=_ints(_starts(h * w for h, w in shapes)),
            cell_start=_ints(_starts(cells)),
            batch=batch,
            rows=rows,
            queries=weights.shape[1],
            heads=heads,
            cells=sum(cells),
            reference_batch=1 if reference is None else reference.shape[0],
        )

    def inputs(self) -> list[ctypes.c_void_p]:
        """The arguments that all kernels over points share."""
        return [_pointer(t) for t in (self.value, self.reference, self.points, self.weights)]

    def blocks(self, owners: int) -> int:
        """How many blocks give every owner its lanes."""
        return -(-owners * self.variant.LANES // _THREADS)


@lru_cache
def _sizes_type(levels: int) -> type[ctypes.Structure]:
    """csrc/deform_attn.cu, struct Sizes."""
    per_level = [(name, ctypes.c_int * levels) for name in ("height", "width", "start", "cell_start")]
    names = ("batch", "rows", "queries", "heads", "cells", "reference_batch")
    return type(
        "Sizes", (ctypes.Structure,), {"_fields_": per_level + [(name, ctypes.c_int) for name in names]}
    )


def _ints(numbers: Iterable[int]) -> ctypes.Array:
    numbers = list(numbers)
    return (ctypes.c_int * len(numbers))(*numbers)


def _starts(counts: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)][:-1]


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous, in a type of the kernels, and at an address from which 16 bytes can be loaded at once."""
    tensor = (tensor if tensor.dtype in _TYPES else tensor.float()).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def find_cuda_kernel(device: int) -> tuple[CudaKernel | None, str]:
    """The kernels for one GPU, and where they come from or why there are none; compiles one to be sure."""
    if torch.version.hip is not None:
        return None, "this torch is a ROCm build"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return None, f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
    architecture = 10 * major + minor
    source = (SOURCES / "deform_attn.cu").read_text()

    def load(variant: Variant) -> nvrtc.Module:
        return nvrtc.Module(nvrtc.compile_source(source, architecture, variant.defines()), device)

    kernel = CudaKernel(architecture, load, lambda: cuda_points(architecture, device))
    try:
        load(Variant(0, 0, 0, 32, 3, 4, 1, *lanes_of(32, 4)))
        kernel.points.compile_one()
    except nvrtc.CudaError as error:
        return None, str(error)
    version = ".".join(map(str, nvrtc.nvrtc_version()))
    return kernel, f"compiled at run time for sm_{architecture} by NVRTC {version}"
