"""CUDA source to running kernels with the libraries that torch installs: NVRTC compiles, the driver launches.

Both are plain C libraries, called through ctypes: no toolkit, no headers and no further package are needed on
a machine where a CUDA build of torch runs. Compiled code is kept in the user's cache (mpformer/ops/build.py).
"""

import ctypes
import hashlib
import re
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from mpformer import atomic
from mpformer.ops.build import SOURCES, BuildError, cache_directory

Argument: TypeAlias = "ctypes._SimpleCData[Any] | ctypes.Structure"
"""Of a kernel: a number, a device pointer as c_void_p, or a structure by value."""


class Launches(Protocol):
    """Compiled code of one variant of a source; tests put an emulation here."""

    def launch(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Starts a kernel of the source; shared: bytes of dynamic shared memory of a block."""


class CudaError(RuntimeError):
    """NVRTC or the driver is missing or failed; the message says what, in one line."""


@lru_cache
def nvrtc_library() -> ctypes.CDLL:
    """NVRTC from torch's packages, else from the system; of torch's major CUDA version if it has one."""
    found = [
        path
        for folder in (
            Path(torch.__file__).parent / "lib",
            *Path(torch.__file__).parents[1].glob("nvidia/*/lib"),
        )
        for path in sorted(folder.glob("libnvrtc.so.*"))
        if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)
    ]
    major = (torch.version.cuda or "").split(".")[0]
    names = [str(path) for path in found if not major or path.name.endswith(f".{major}")]
    names += [f"libnvrtc.so.{major}"] if major else ["libnvrtc.so.13", "libnvrtc.so.12"]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"NVRTC (libnvrtc.so.{major or '*'}) is not installed")


def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def supported_architectures() -> list[int]:
    """Compute capabilities that NVRTC compiles for, as 80, 90, ..."""
    count = ctypes.c_int()
    _check(nvrtc_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    architectures = (ctypes.c_int * count.value)()
    _check(nvrtc_library().nvrtcGetSupportedArchs(architectures))
    return sorted(architectures)


def compile_source(
    source: str, architecture: int, defines: Sequence[tuple[str, int]], name: str = "deform_attn.cu"
) -> bytes:
    """Machine code for `architecture` (90 for sm_90), or PTX where NVRTC is older than the GPU.

    The source may include headers of csrc. Raises CudaError with the first error line of the compiler, which
    calls the source `name`.
    """
    known = [a for a in supported_architectures() if a <= architecture]
    if not known:
        raise CudaError(f"NVRTC {nvrtc_version()} does not compile for sm_{architecture}")
    native = known[-1] == architecture
    target = f"sm_{architecture}" if native else f"compute_{known[-1]}"
    options = [
        f"--gpu-architecture={target}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in defines),
    ]
    included = re.findall(r'^#include "(.+)"', source, re.MULTILINE)
    headers = {header: (SOURCES / header).read_text() for header in included}
    key = repr((source, headers, options, nvrtc_version()))
    try:
        cached = cache_directory() / "cuda" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.bin"
    except BuildError as error:
        raise CudaError(str(error)) from None
    if cached.exists():
        return cached.read_bytes()
    code = _compile(source, name, headers, options, native)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic.replacing(cached) as partial:
            partial.write_bytes(code)
    except OSError as error:  # the cache only saves time
        warnings.warn(f"compiled CUDA code is not kept in {cached.parent}: {error.strerror}", stacklevel=2)
    return code


def _compile(source: str, name: str, headers: dict[str, str], options: list[str], native: bool) -> bytes:
    library = nvrtc_library()
    program = ctypes.c_void_p()
    texts, names = _strings(headers.values()), _strings(headers)
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        )
    )
    try:
        if library.nvrtcCompileProgram(program, len(options), _strings(options)) != 0:
            size = ctypes.c_size_t()
            _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(library.nvrtcGetProgramLog(program, log))
            lines = log.value.decode().splitlines()
            raise CudaError(
                next((line for line in lines if "error" in line), "NVRTC failed without an error line")
            )
        what = "CUBIN" if native else "PTX"
        size = ctypes.c_size_t()
        _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(getattr(library, f"nvrtcGet{what}")(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(texts: Collection[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _check(result: int) -> None:
    if result != 0:
        text = nvrtc_library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise CudaError(f"NVRTC: {text(result).decode()}")


_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_PER_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_SHARED_WITHOUT_ASKING = 32 * 1024  # static and dynamic memory up to 48 KB need no attribute


def shared_memory_per_block(device: int) -> int:
    """Bytes of shared memory, static and dynamic, that a block may have on a GPU."""
    handle, size = ctypes.c_int(), ctypes.c_int()
    _driver_check(_driver().cuDeviceGet(ctypes.byref(handle), device))
    _driver_check(_driver().cuDeviceGetAttribute(ctypes.byref(size), _SHARED_PER_BLOCK, handle))
    return size.value


class Module:
    """Machine code loaded on one device; launches its kernels on torch's current stream."""

    def __init__(self, code: bytes, device: int):
        self._device = device
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            _context(device)
            _driver_check(_driver().cuModuleLoadData(ctypes.byref(self._handle), code))

    def launch(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Starts `kernel` on `blocks` blocks of `threads` threads with `shared` bytes of dynamic memory."""
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments)
        )
        with torch.cuda.device(self._device):
            _context(self._device)
            if kernel not in self._functions:
                function = ctypes.c_void_p()
                _driver_check(
                    _driver().cuModuleGetFunction(ctypes.byref(function), self._handle, kernel.encode())
                )
                self._functions[kernel] = function
            if shared > _SHARED_WITHOUT_ASKING:
                _driver_check(
                    _driver().cuFuncSetAttribute(self._functions[kernel], _MAX_DYNAMIC_SHARED, shared)
                )
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            grid = (ctypes.c_uint(n) for n in (blocks, 1, 1, threads, 1, 1, shared))
            _driver_check(_driver().cuLaunchKernel(self._functions[kernel], *grid, stream, pointers, None))


@lru_cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the CUDA driver does not load ({error})") from error


def _context(device: int) -> None:
    """Makes torch's context current in this thread, as a thread that has not used CUDA yet has none."""
    context = ctypes.c_void_p()
    _driver_check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        handle = ctypes.c_int()
        _driver_check(_driver().cuDeviceGet(ctypes.byref(handle), device))
        _driver_check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        _driver_check(_driver().cuCtxSetCurrent(context))


def _driver_check(result: int) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise CudaError(f"CUDA driver: {(text.value or b'unknown error').decode()}")
