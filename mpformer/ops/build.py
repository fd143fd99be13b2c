"""Builds the CPU kernels: at installation where a compiler is there, else on first use into a cache.

Standard library only, and no import of the package: setup.py runs this file by its path. The result has a
plain C interface and needs neither the headers nor the version of any torch.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
_FILES = (
    *("deform_attn_cpu.h", "deform_attn_types.h", "deform_attn_cpu.cpp", "deform_attn_kernel.cpp"),
    *("mask_points.h", "mask_points_cpu.cpp", "mask_points_kernel.cpp", "philox.h", "threads.h"),
)

# Nothing reads errno or floating-point traps, and both keep the compiler from vectorising.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]

# Only when tuning for such a processor does GCC turn a loop of look-ups into gather instructions.
_OPERATORS: dict[str, list[str]] = {"deform_attn": [], "mask_points": ["-mtune=icelake-server"]}

# name of the kernel, floats per vector, flags
_PLAIN: list[tuple[str, int, list[str]]] = [("kernel_plain", 4, [])]
_X86 = [*_PLAIN, ("kernel_avx2", 8, ["-mavx2", "-mfma"]), ("kernel_avx512", 16, _AVX512)]


class BuildError(Exception):
    """The kernel cannot be built here; the message says why, in one line."""


def source_hash() -> str:
    """Hash of all that decides what the library does: sources and compiler flags."""
    digest = hashlib.sha256(repr((_FLAGS, _X86, _OPERATORS)).encode())
    for name in _FILES:
        digest.update((SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler as the start of a command line: $CXX, else the first of c++, g++, clang++ on PATH."""
    if os.name != "posix":
        raise BuildError("the CPU kernel needs a POSIX system (Linux or macOS)")
    candidates = (
        [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    )
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    if os.environ.get("CXX"):
        raise BuildError(f"the C++ compiler {os.environ['CXX']!r} named by CXX is not there")
    raise BuildError("no C++ compiler (c++, g++ or clang++) on PATH")


def compile_library(target: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compiles and links the shared library `target`, replacing it atomically. Raises BuildError."""
    compiler = find_compiler()
    x86 = _target(compiler).startswith(("x86_64", "amd64"))
    flags = [*_FLAGS, *extra_flags]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        jobs = [
            [
                str(SOURCES / f"{operator}_kernel.cpp"),
                f"-DMPFORMER_KERNEL={'mask_' if operator == 'mask_points' else ''}{name}",
                f"-DMPFORMER_LANES={lanes}",
                *own,
                *(tuning if lanes == 16 and own else []),
            ]
            for operator, tuning in _OPERATORS.items()
            for name, lanes, own in (_X86 if x86 else _PLAIN)
        ]
        jobs.append([str(SOURCES / "mask_points_cpu.cpp")])
        jobs.append([str(SOURCES / "deform_attn_cpu.cpp"), f'-DMPFORMER_SOURCE_HASH="{source_hash()}"'])
        objects = [os.path.join(folder, f"{i}.o") for i in range(len(jobs))]
        _run([[*compiler, *flags, "-c", *job, "-o", o] for job, o in zip(jobs, objects, strict=True)])
        built = os.path.join(folder, "library.so")
        _run([[*compiler, "-shared", *objects, "-o", built, "-pthread"]])
        os.replace(built, target)


def _target(compiler: list[str]) -> str:
    """What the compiler builds for, as "x86_64-linux-gnu": not this machine for a cross compiler."""
    try:
        done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{compiler[0]} could not be started: {error}") from error
    return done.stdout.strip() or platform.machine().lower()


def _run(commands: list[list[str]]) -> None:
    try:
        running = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
        ]
    except OSError as error:
        raise BuildError(f"{commands[0][0]} could not be started: {error}") from error
    for command, process in zip(commands, running, strict=True):
        output, _ = process.communicate()
        if process.returncode != 0:
            lines = (
                [line for line in output.splitlines() if "error" in line.lower()]
                or output.splitlines()
                or ["?"]
            )
            raise BuildError(f"{command[0]} failed (exit {process.returncode}): {lines[0].strip()}")


def cache_directory() -> Path:
    """Where kernels built on this machine are kept: $MPFORMER_CACHE, else the user's cache directory.

    Raises BuildError for a user without a home folder; the command line makes one (`mpformer.home`).
    """
    if os.environ.get("MPFORMER_CACHE"):
        return Path(os.environ["MPFORMER_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise BuildError("no home folder for the cache: set HOME or MPFORMER_CACHE")
    return Path(base) / "mpformer"


def cached_library() -> Path:
    """The library for these sources, this compiler and this machine; built now if it is not in the cache.

    Processes that start together wait for the one that builds. Raises BuildError.
    """
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (source_hash(), version, sys.platform, platform.machine(), *platform.libc_ver())
    path = cache_directory() / f"deform_attn_cpu-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                compile_library(path)
    except OSError as error:
        where = "set MPFORMER_CACHE to a writable folder"
        raise BuildError(
            f"the kernel cannot be written to {path.parent} ({error.strerror}): {where}"
        ) from error
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, as is everything after find_compiler

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
