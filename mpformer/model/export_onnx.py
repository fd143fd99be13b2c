"""A model as an ONNX file, which holds normalisation, network and the predictions of the last head.

The file is compared with the model in ONNX Runtime before it is written. Post-processing is not in it; class
table, task and test size are, as metadata. Height and width are fixed, the number of images may be any.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mpformer import atomic
from mpformer.model.architecture import Architecture
from mpformer.types import InputError, RunError

if TYPE_CHECKING:
    import onnxruntime

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = (1 << 31) - 1
"""Bytes of an ONNX file that holds its weights, which is one message of protobuf."""
_TOO_LARGE = "an ONNX file holds at most 2 GiB"
_TIMED = 3
"""Forward passes that the printed time is the best of."""
_TOLERANCE = 1e-3
"""Of the largest difference of a logit, beside `_ROUNDING` times the model's own rounding."""
_ROUNDING = 10.0


@dataclass(frozen=True)
class Comparison:
    """The outputs of the file in ONNX Runtime beside those of the model in torch, on the same images."""

    errors: dict[str, float]
    """By output: the largest difference of a logit."""
    rounding: dict[str, float]
    """By output: the largest difference of the model in float32 from itself in float64."""
    largest: dict[str, float]
    """By output: the largest logit."""
    torch_seconds: float
    """Of one forward pass."""
    onnx_seconds: float
    images: int

    def beyond(self) -> list[str]:
        """The outputs whose error rounding does not explain."""
        return [
            name
            for name, error in self.errors.items()
            if not error <= _TOLERANCE * max(1.0, self.largest[name]) + _ROUNDING * self.rounding[name]
        ]

    def __str__(self) -> str:
        lines = [
            f"{name:12} largest error {error:.2g} of values up to {self.largest[name]:.3g}; "
            f"float32 itself is {self.rounding[name]:.2g} from float64"
            for name, error in self.errors.items()
        ]
        ratio = self.torch_seconds / self.onnx_seconds
        per_image = [1000 * seconds / self.images for seconds in (self.onnx_seconds, self.torch_seconds)]
        lines.append(
            f"{'speed':12} ONNX Runtime {per_image[0]:.0f} ms per image, torch {per_image[1]:.0f} ms "
            f"({ratio:.2g} times as fast)"
        )
        return "\n".join(lines)


def require_onnx() -> None:
    """Raise `InputError` where a package that exporting needs is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"export: not installed: {', '.join(missing)}: pip install {' '.join(missing)}")


def export_onnx(
    model: Architecture,
    out: Path,
    images: Tensor,
    notes: Mapping[str, str],
    *,
    batch: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Comparison:
    """Write the model as ONNX file `out`, if it computes the same in ONNX Runtime.

    images [B,3,H,W], uint8 or float32 in 0..255: those it is compared on, which fix height and width, and
    the dtype of the file's input. `notes`: its metadata. `batch`: how many images the file takes; None: any
    number, and the comparison is made with all of `images` (two at least) and with the first alone. Raises
    `InputError` where a package is missing or the model cannot be exported, `RunError` where ONNX Runtime
    does not run the file, or its outputs differ by more than rounding; then nothing is written.
    """
    require_onnx()
    content = to_onnx(model, images, notes, any_batch=batch is None)
    session = _session(content)
    comparisons = [_compare(model, session, part) for part in _parts(images, batch)]
    for found in comparisons:
        if report:
            report(str(found))
        if beyond := found.beyond():
            raise RunError(
                f"{out}: not written: in ONNX Runtime {' and '.join(beyond)} differ from the model's by more "
                "than rounding"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as partial:
        partial.write_bytes(content)
    return comparisons[0]


class _LastHead(nn.Module):
    """The model with tensors for its output."""

    def __init__(self, model: Architecture) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head = self.model(images).heads[-1]
        return (head.mask_logits,) if head.class_logits is None else (head.class_logits, head.mask_logits)


def output_names(model: Architecture) -> list[str]:
    """Of the file: class_logits [B,Q,K+1], which per-pixel models lack, and mask_logits [B,Q,H/4,W/4]."""
    return ["mask_logits"] if model.structure.per_pixel else ["class_logits", "mask_logits"]


def to_onnx(model: Architecture, images: Tensor, notes: Mapping[str, str], *, any_batch: bool) -> bytes:
    """The file's content, for images of the shape and dtype of these, of any number if `any_batch`.

    Raises `InputError` for a model whose operations have no form in ONNX, and for one that is too large for a
    file.
    """
    _check_size(sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    wrapped = _LastHead(model).eval()
    # an example of one image would fix the number to one
    example = torch.zeros((2, *images.shape[1:]) if any_batch else images.shape, dtype=images.dtype)
    dynamic = ({0: "batch"},) if any_batch else None
    with torch.no_grad(), _quiet():
        try:
            exported = torch.onnx.export(
                wrapped,
                (example,),
                input_names=["images"],
                output_names=output_names(model),
                dynamic_shapes=dynamic,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"export: the model has operations that ONNX cannot hold: {reason}") from error
    assert exported is not None  # it is, with `dynamo`
    exported.model.metadata_props.update(notes)
    try:
        content = exported.model_proto.SerializeToString()
    except Exception as error:  # protobuf's own, by its implementation another one
        raise InputError(f"export: {_TOO_LARGE}: {_first_line(error)}") from error
    _check_size(len(content))
    return content


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise InputError(f"export: {_TOO_LARGE}; this model has {size / 2**30:.2f} GiB")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print, log and warn of on their way."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)


def _session(content: bytes) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it has to say of an error is in the exception
    with _failures_told():
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _failures_told() -> Iterator[None]:
    """What ONNX Runtime raises is one line."""
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

    # its exceptions have no class in common but `Exception`
    own = [value for value in vars(bindings).values() if isinstance(value, type)]
    raised: list[type[Exception]] = [value for value in own if issubclass(value, Exception)]
    errors: tuple[type[Exception], ...] = (MemoryError, RuntimeError, *raised)
    try:
        yield
    except errors as error:
        raise RunError(
            f"export: not written: ONNX Runtime fails on the file: {_first_line(error)}"
        ) from error


def _parts(images: Tensor, batch: int | None) -> list[Tensor]:
    """The images of each comparison: as many as the file takes, or all and one."""
    return [images[:batch]] if batch is not None else [images, images[:1]]


def _compare(model: Architecture, session: onnxruntime.InferenceSession, images: Tensor) -> Comparison:
    names = output_names(model)
    wrapped = _LastHead(model).eval()
    with _failures_told():
        found, onnx_seconds = _timed(lambda: session.run(names, {"images": images.numpy()}))
    with torch.inference_mode():
        wanted, torch_seconds = _timed(lambda: wrapped(images))
        exact = copy.deepcopy(wrapped).double()(images.double())
    pairs = zip(names, found, wanted, exact, strict=True)
    errors, rounding, largest = {}, {}, {}
    for name, onnx_values, torch_values, exact_values in pairs:
        errors[name] = float(np.abs(onnx_values - torch_values.numpy()).max())
        rounding[name] = float((torch_values - exact_values).abs().max())
        largest[name] = float(torch_values.abs().max())
    return Comparison(errors, rounding, largest, torch_seconds, onnx_seconds, len(images))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and the least time that it took."""
    seconds = []
    for _ in range(1 + _TIMED):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)
