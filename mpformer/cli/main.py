"""The command line: calls what a command names, and turns errors into exit codes.

0: done. 1: the run failed. 2: the input is wrong. 130: interrupted by Ctrl-C. An error is one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mpformer.cli.output import print_any_text
from mpformer.cli.parser import parse
from mpformer.home import ensure_home
from mpformer.types import InputError, RunError

_RESUMING = ("train", "ablate", "quickstart", "data_pack")
"""Functions of the commands that, given again, go on from what is there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: the exit code of the command that `argv` (default: the process's arguments) asks for."""
    for stream in (sys.stdout, sys.stderr):
        print_any_text(stream)
    # before torch is loaded: idle OpenMP threads that spin take the cores from other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    function = None
    try:
        function, arguments = parse(sys.argv[1:] if argv is None else argv)
        if (line := ensure_home()) is not None:
            print(f"mpformer: {line}", file=sys.stderr)
        function(**arguments)
    except InputError as error:
        return _fail(2, str(error))
    except RunError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        goes_on = getattr(function, "__name__", "") in _RESUMING
        return _fail(130, "interrupted" + "; the same command goes on where it stopped" * goes_on)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk; a bug where no file is named
        if error.filename is None or error.strerror is None:
            raise
        return _fail(1, f"{error.filename}: {error.strerror}")
    return 0


def _fail(code: int, reason: str) -> int:
    # line breaks only: two spaces in a command that the message proposes are two spaces of a name
    line = " ".join(stripped for line in reason.splitlines() if (stripped := line.strip()))
    print(f"mpformer: {line}", file=sys.stderr)
    return code
