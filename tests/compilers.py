"""A C++ compiler for tests of how kernels are built, where what they compute is not the question."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpformer.ops import build


def quick_compiler(folder: Path) -> str:
    """A value for CXX: the compiler of this machine, which leaves out the optimisation, most of its work.

    Raises `build.BuildError` where there is none.
    """
    script = folder / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(build.find_compiler())} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)
