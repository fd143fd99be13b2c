"""Adds the compiled CPU kernel to a wheel where a C++ compiler is there; the rest is in pyproject.toml.

Without a compiler the installation goes through with a warning, and the kernel is built on first use or
replaced by the reference (mpformer/ops/kernels.py).
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_spec = importlib.util.spec_from_file_location(
    "build", Path(__file__).parent / "mpformer" / "ops" / "build.py"
)
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


class BuildKernel(build_ext):
    """Builds the library as the package itself does: several files, one per instruction set, no Python.h."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            raise CompileError(str(error)) from error  # a warning, as the extension is optional


setup(
    ext_modules=[Extension("mpformer.ops._deform_attn_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel},
)
