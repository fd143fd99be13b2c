"""What a wheel holds beside the Python files: the compiled CPU kernel, the shipped experiments, the commit.

The rest is in pyproject.toml. Without a C++ compiler the installation goes through with a warning, and the
kernel is built on first use or replaced by the reference (mpformer/ops/kernels.py).
"""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


def _load(path: str) -> ModuleType:
    """A module of the package that imports nothing of it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "mpformer" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, commit = _load("ops/build.py"), _load("tracking/commit.py")


class BuildKernel(build_ext):
    """Builds the library as the package itself does: several files, one per instruction set, no Python.h."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            raise CompileError(str(error)) from error  # a warning, as the extension is optional


class BuildWithExperiments(build_py):
    """Puts the files of experiments/ into the package, where mpformer/config/shipped.py looks for them, and
    the commit, where mpformer/tracking/commit.py does.

    An editable installation reads those of the checkout.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "mpformer", "experiments")
            shutil.rmtree(target, ignore_errors=True)  # files of an earlier build
            shutil.copytree(ROOT / "experiments", target)
            package = target.parent
            (package / "COMMIT").unlink(missing_ok=True)
            if (known := commit.commit_of(ROOT / "mpformer")) is not None:
                commit.stamp(package, known)

    def get_source_files(self) -> list[str]:
        """With the experiments, so that a source distribution has them, too."""
        return [*super().get_source_files(), *map(str, _experiments())]


def _experiments() -> list[Path]:
    return [path.relative_to(ROOT) for path in (ROOT / "experiments").rglob("*") if path.is_file()]


setup(
    ext_modules=[Extension("mpformer.ops._deform_attn_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel, "build_py": BuildWithExperiments},
)
