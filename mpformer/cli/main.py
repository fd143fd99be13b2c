"""The command line: it calls what a command names, and turns errors into exit codes.

0: done. 1: the run failed. 2: the input is wrong. An error is one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mpformer.cli import checkpoints, data, runs, studies, weights
from mpformer.cli.parser import parse
from mpformer.types import InputError, RunError


def _run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "quickstart":
            studies.quickstart(arguments.settings)
        case "train":
            runs.train(arguments.recipe, arguments.settings)
        case "ablate":
            studies.ablate(arguments.study, arguments.settings, arguments.only, arguments.plan)
        case "report":
            studies.report_file(arguments.study, arguments.settings)
        case "sync":
            runs.sync(arguments.run)
        case "evaluate":
            checkpoints.evaluate(arguments.checkpoint, arguments.data, arguments.settings)
        case "diagnose":
            checkpoints.diagnose(arguments.checkpoint, arguments.data, arguments.settings)
        case "predict":
            checkpoints.predict(arguments.checkpoint, arguments.images, arguments.out, arguments.settings)
        case "data":
            _run_data(arguments)
        case "weights":
            _run_weights(arguments)
        case "doctor":
            runs.doctor()
        case "show":
            runs.show(arguments.recipe, arguments.recipe2, arguments.settings)


def _run_data(arguments: argparse.Namespace) -> None:
    match arguments.data_command:
        case "synth":
            data.data_synth(arguments.out, arguments.settings)
        case "check":
            data.data_check(arguments.data, arguments.settings)
        case "pack":
            data.data_pack(arguments.data, arguments.out, arguments.settings)
        case "show":
            data.data_show(arguments.data, arguments.out, arguments.settings)
        case "bench":
            data.data_bench(arguments.data, arguments.settings)


def _run_weights(arguments: argparse.Namespace) -> None:
    match arguments.weights_command:
        case "import":
            weights.weights_import(arguments.source, arguments.out)
        case "export":
            weights.weights_export(arguments.checkpoint, arguments.folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: the exit code of the command that `argv` (default: the process's arguments) asks for."""
    try:
        _run(parse(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        return _fail(2, str(error))
    except RunError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(1, "interrupted; the same command goes on from the last checkpoint")
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that cannot be written, a disk that is full; of ours only with a name
        if error.filename is None or error.strerror is None:
            raise
        return _fail(1, f"{error.filename}: {error.strerror}")
    return 0


def _fail(code: int, reason: str) -> int:
    print(f"mpformer: {' '.join(reason.split())}", file=sys.stderr)
    return code
