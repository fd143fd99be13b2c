"""Building the CPU kernel, and life without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpformer.ops import build, kernel_status, kernels
from tests.compilers import quick_compiler

pytestmark = pytest.mark.slow

PACKAGE = Path(build.__file__).parents[1]

RUN = """
import torch
from mpformer.ops import kernel_status, ms_deform_attn
from mpformer.ops.reference import ms_deform_attn_reference

torch.manual_seed(0)
value, points, weights = torch.rand(1, 6, 2, 3), torch.rand(1, 4, 2, 1, 2, 2), torch.rand(1, 4, 2, 1, 2)
got = ms_deform_attn(value, ((2, 3),), points, weights)
torch.testing.assert_close(got, ms_deform_attn_reference(value, ((2, 3),), points, weights))
ms_deform_attn(value, ((2, 3),), points, weights)
cpu = kernel_status()[0]
print(cpu.kernel, cpu.compiled, cpu.reason, cpu.advice, sep="|")
"""


@pytest.fixture
def process(tmp_path):
    """Starts Python on a copy of the package without installed libraries, with an empty cache."""
    copied = tmp_path / "source" / "mpformer"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def start(code: str = RUN, **environment: str) -> subprocess.Popen:
        base = {k: v for k, v in os.environ.items() if k not in ("CXX", "MPFORMER_DEFORM_ATTN", "PYTHONPATH")}
        base |= {
            "PYTHONPATH": str(copied.parent),
            "MPFORMER_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=base | environment,
            cwd=copied.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.cache = tmp_path / "cache"
    start.package = copied
    return start


def finish(process: subprocess.Popen) -> tuple[list[str], str]:
    """The fields that RUN printed, and stderr."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.strip().split("|"), err


@pytest.fixture
def compiler(tmp_path):
    """The name of a C++ compiler, as CXX has it."""
    try:
        return quick_compiler(tmp_path)
    except build.BuildError as error:
        pytest.skip(str(error))


def test_without_a_compiler_the_reference_runs_and_says_so_once(process, tmp_path):
    status, err = finish(process(PATH=str(tmp_path)))
    assert status[:2] == ["reference", "False"]
    assert "no C++ compiler (c++, g++ or clang++) on PATH" in status[2]
    assert "install a C++ compiler" in status[3]
    loud = [line for line in err.splitlines() if "RuntimeWarning" in line]
    assert len(loud) == 1
    assert "no C++ compiler" in loud[0]
    assert "times slower" in loud[0]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """The search for a kernel in this process, with nothing installed, an empty cache and no memory."""
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path / "cache"))
    return kernels._cpu_kernel.__wrapped__


def test_a_compiler_that_fails_is_quoted(search, monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing as float' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    kernel, reason = search()
    assert kernel is None
    assert reason.endswith("broken-c++ failed (exit 3): x.cpp:1: error: no such thing as float")
    assert not list((tmp_path / "cache").glob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert search() == (None, "the C++ compiler 'no-such-compiler -O1' named by CXX is not there")


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_named(search, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path / "file" / "below"))
    kernel, reason = search()
    assert kernel is None
    assert "set MPFORMER_CACHE to a writable folder" in reason


def test_the_setting(monkeypatch):
    monkeypatch.setenv("MPFORMER_DEFORM_ATTN", "reference")
    status = kernel_status()[0]
    assert (status.kernel, status.compiled, status.advice) == (
        "reference",
        False,
        "unset MPFORMER_DEFORM_ATTN",
    )
    monkeypatch.setenv("MPFORMER_DEFORM_ATTN", "fast")
    with pytest.raises(ValueError, match="MPFORMER_DEFORM_ATTN must be auto or reference, not 'fast'"):
        kernel_status()


def test_processes_that_start_together_build_once(process, compiler):
    """Three at once; then one more, which must not need the compiler's work again."""
    started = [process(CXX=compiler) for _ in range(3)]
    for status, err in map(finish, started):
        assert status[1] == "True"
        assert "RuntimeWarning" not in err
    libraries = list(process.cache.glob("*.so"))
    assert len(libraries) == 1
    built = libraries[0].stat()
    assert finish(process(CXX=compiler))[0][1] == "True"
    assert libraries[0].stat().st_mtime_ns == built.st_mtime_ns
    assert not list(process.cache.glob(".build-*"))


def test_an_installed_library_is_used_only_if_it_is_of_these_sources(
    process, search, compiler, monkeypatch, tmp_path
):
    """No compiler at run time: the library beside the package serves, until a source changes.

    Each library has a name of its own: one that was loaded would be found again by its name.
    """
    older = tmp_path / "older.cpp"  # it lacks what was added since
    older.write_text('extern "C" const char* mpformer_deform_attn_source() { return "older"; }')
    subprocess.run([compiler, "-shared", "-fPIC", str(older), "-o", str(tmp_path / "older.so")], check=True)
    ops = process.package / "ops"
    with monkeypatch.context() as patch:
        patch.setenv("CXX", compiler)
        build.compile_library(ops / "_deform_attn_cpu.test.so")
    status, err = finish(process(PATH=str(tmp_path)))
    assert status[1] == "True"
    assert "built at installation" in status[2]
    assert "RuntimeWarning" not in err

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernels, "__file__", str(ops / "kernels.py"))
    monkeypatch.setattr(build, "SOURCES", ops / "csrc")
    assert search()[0] is not None
    with (ops / "csrc" / "deform_attn_cpu.h").open("a") as source:
        source.write("// changed\n")
    kernel, reason = search()
    assert kernel is None
    assert "the installed library was built from other sources; no C++ compiler" in reason
    (ops / "_deform_attn_cpu.test.so").unlink()
    shutil.move(tmp_path / "older.so", ops / "_deform_attn_cpu.older.so")
    kernel, reason = search()
    assert kernel is None
    assert "the installed library was built from other sources; no C++ compiler" in reason
    (ops / "_deform_attn_cpu.older.so").unlink()
    (ops / "_deform_attn_cpu.text.so").write_bytes(b"not a library")
    kernel, reason = search()
    assert kernel is None
    assert "the installed library does not load" in reason


def test_importing_needs_torch_alone(process):
    code = "import sys, mpformer.ops; print(*{'ray', 'mlflow', 'pydantic', 'timm'}.intersection(sys.modules))"
    out, err = process(code).communicate(timeout=200)
    assert out.strip() == "", err


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no compiler for arm64 here")
def test_compiles_for_arm64(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    build.compile_library(tmp_path / "library.so", ("-Wall", "-Wextra", "-Werror"))
    header = (tmp_path / "library.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
