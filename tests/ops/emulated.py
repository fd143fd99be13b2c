"""CUDA sources as C++ on the emulation of blocks in cuda_emulation.h."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mpformer.ops import build

_FOOTER = """
#include "deform_attn_types.h"
float to_float(Half x) { return mpformer::to_float(mpformer::Half{x.bits}); }
void from_float(float f, Half& x) { mpformer::Half h; mpformer::from_float(f, h); x.bits = h.bits; }
void from_float(float f, Bfloat16& x) { mpformer::Bfloat16 h; mpformer::from_float(f, h); x.bits = h.bits; }
#define ENTRY(name) \\
  extern "C" void emulated_##name(int blocks, int threads, int shared, void** arguments) { \\
  emulation::launch(name, blocks, threads, shared, arguments); }
"""


class Emulated:
    """One variant of a source as C++; launches as nvrtc.Module does."""

    def __init__(
        self, cuda: Path, kernels: Sequence[str], defines: Sequence[tuple[str, int]], folder: Path
    ) -> None:
        name = "-".join([cuda.stem, *(str(value) for _, value in defines)])
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        if not library.exists():
            entries = "\n".join(f"ENTRY({kernel})" for kernel in kernels)
            source.write_text(f'#include "cuda_emulation.h"\n#include "{cuda}"\n{_FOOTER}{entries}\n')
            include = [f"-I{Path(__file__).parent}", f"-I{build.SOURCES}"]
            macros = [f"-D{macro}={value}" for macro, value in defines]
            flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            command = [*build.find_compiler(), *flags, *include, *macros, str(source), "-o", str(library)]
            subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, kernel, blocks, threads, arguments, shared=0):
        """Runs the kernel to its end."""
        assert blocks > 0, f"{kernel}: a GPU refuses to launch nothing"
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments)
        )
        getattr(self._library, f"emulated_{kernel}")(blocks, threads, shared, pointers)
