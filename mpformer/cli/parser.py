"""The whole surface of the command line: commands, their arguments, and `key=value` settings.

A command names its function and has an argument for each of the function's parameters, with the same name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from mpformer import __version__
from mpformer.cli import checkpoints, data, export, runs, studies, weights
from mpformer.config.yamlfile import nearest
from mpformer.shell import SETTING, place
from mpformer.types import InputError

RECIPE = "a recipe: a file, or the name of a shipped one, such as coco-tiny"
STUDY = "a study: a file, or the name of a shipped one, such as mpformer-table8"
RUN = "a run's folder, runs/NAME-HASH-sSEED"
CHECKPOINT = (
    "a run's folder (RUN@last: not the best), one of its checkpoints, a .safetensors file of ours, a name of "
    "`mpformer weights list`, hf:OWNER/NAME[@REVISION], or a URL"
)
DATA = "a data folder, or a recipe"
OTHER_DATA = "a data folder, or a recipe to take the data of"
SETTINGS = "settings to change, for instance train.lr=2e-4"
IMAGES = "image files or folders (a=b.png: ./a=b.png); and key=value settings, for instance evaluate.batch=8"

if TYPE_CHECKING:
    _Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
VALUED = ("--only", "--data", "--out", "--fix", "--score")
FLAGS = ("--plan", "--help", "-h", "--version", "--help-settings", "--json-schema")
"""The options that the next argument belongs to, and the others."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message = f"no command '{wrong[1]}'; nearest: {nearest(wrong[1], re.findall('[a-z]+', wrong[2]))}"
        if message.endswith("required: COMMAND"):
            message = "a command is expected; mpformer --help lists them"
        message = message.replace(", key=value", "")  # which may be left out
        raise InputError(f"{message} (usage: {' '.join(self.format_usage().split()[1:])})")


def build_parser() -> argparse.ArgumentParser:
    """The whole surface; a test freezes it. Settings are `key=value`: there are hardly any flags."""
    parser = _Parser(prog="mpformer", description="Experiments with mask-piloted segmentation transformers.")
    parser.add_argument("--version", action="version", version=f"mpformer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    help = "a small generated data set, then Mask2Former against MP-Former on it"
    quickstart = _command(commands, "quickstart", studies.quickstart, help)
    _add_settings(quickstart)

    train = _command(commands, "train", runs.train, "one run; the same command again resumes it")
    train.add_argument("recipe", metavar="RECIPE", help=RECIPE)
    _add_settings(train)

    ablate = _command(commands, "ablate", studies.ablate, "a table; the same command again resumes it")
    ablate.add_argument("study_file", metavar="STUDY", help=STUDY)
    ablate.add_argument("--plan", action="store_true", help="only say what would be done")
    ablate.add_argument("--only", metavar="ROW", help="the runs of one row, or of several: A,B")
    _add_settings(ablate)

    help = "tables, training-speed curves, one HTML page; of a study or a run"
    report = _command(commands, "report", studies.report, help)
    report.add_argument("place", metavar="STUDY", help=f"{STUDY}; or {RUN}")
    _add_settings(report)

    sync = _command(commands, "sync", runs.sync, "bring to MLflow what it could not take")
    sync.add_argument("run", metavar="RUN", help=RUN)

    help = "AP / PQ / mIoU, images/s, peak memory"
    evaluate = _command(commands, "evaluate", checkpoints.evaluate, help)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    evaluate.add_argument("--data", metavar="D", help=OTHER_DATA)
    _add_settings(evaluate)

    help = "the layers' consistency: Table 1 of the paper, Figure 1 pictures"
    diagnose = _command(commands, "diagnose", checkpoints.diagnose, help)
    diagnose.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    diagnose.add_argument("--data", metavar="D", help=OTHER_DATA)
    _add_settings(diagnose)

    help = "overlay PNG and COCO-style JSON of image files or folders"
    predict = _command(commands, "predict", checkpoints.predict, help)
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    predict.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES)
    predict.add_argument("--out", metavar="DIR", required=True)
    help = "least score of a segment, 0 to 1 (instances 0.5, panoptic evaluate.class_confidence)"
    predict.add_argument("--score", metavar="S", type=_share, help=help)
    predict.set_defaults(settings=[])  # key=value, too, but argparse allows one open-ended list only

    help = "an ONNX file, compared with the model before it is written: size=512x768 batch=any input=uint8"
    onnx = _command(commands, "export", export.export, help)
    onnx.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    onnx.add_argument("out", metavar="OUT.onnx")
    _add_settings(onnx)

    _add_data_commands(_group(commands, "data", "data sets"))
    _add_weights_commands(_group(commands, "weights", "other programs' models"))

    help = "what is installed, which deformable-attention kernel runs here and why"
    _command(commands, "doctor", runs.doctor, help)

    help = "the resolved settings of a recipe, or the difference of two; or what settings there are"
    show = _command(commands, "show", runs.show, help)
    show.add_argument("recipe", metavar="RECIPE", nargs="?", help=RECIPE)
    show.add_argument("other", metavar="RECIPE2", nargs="?")
    help = "every setting, or those of one section, with default, values and meaning"
    show.add_argument("--help-settings", metavar="KEY", nargs="?", const="", help=help)
    help = "the JSON Schema of a recipe, a study or a data-set, for editors"
    show.add_argument("--json-schema", metavar="KIND", nargs="?", const="recipe", help=help)
    _add_settings(show)
    return parser


def _add_data_commands(commands: _Commands) -> None:
    help = "generate a data set in COCO's layout: train=400 val=60 seed=0 size=128 things=5"
    synth = _command(commands, "synth", data.data_synth, help)
    synth.add_argument("out", metavar="OUT")
    _add_settings(synth)

    help = "what a data set holds and what is wrong with it, in words"
    check = _command(commands, "check", data.data_check, help)
    check.add_argument("place", metavar="D", help=DATA)
    check.add_argument("--fix", metavar="OUT", help="write mended copies of COCO annotations to this folder")
    check.add_argument("--out", metavar="DIR", help="folder for its picture; else STORAGE/data-check/NAME")
    _add_settings(check)

    help = "YOLO, Pascal VOC, LabelMe, VIA or Supervisely data as COCO instance annotations"
    convert = _command(commands, "convert", data.data_convert, help)
    convert.add_argument("source", metavar="SRC", help="its folder, or the data.yaml or VIA file in it")
    convert.add_argument("out", metavar="OUT", help="a new folder; images are hard links to those of SRC")
    _add_settings(convert)

    help = "a data set as Parquet shards, for disks and object stores"
    pack = _command(commands, "pack", data.data_pack, help)
    pack.add_argument("place", metavar="D", help=DATA)
    pack.add_argument("out", metavar="OUT", help="a folder, or s3://bucket/folder")
    _add_settings(pack)

    help = "pictures of images with their masks, and of training samples as the model gets them"
    show = _command(commands, "show", data.data_show, help)
    show.add_argument("place", metavar="D", help=DATA)
    show.add_argument("--out", metavar="DIR", required=True)
    _add_settings(show)

    help = "how fast the data comes, stage by stage and through the loader, with no model"
    bench = _command(commands, "bench", data.data_bench, help)
    bench.add_argument("place", metavar="D", help=DATA)
    _add_settings(bench)


def _add_weights_commands(commands: _Commands) -> None:
    help = (
        "an official Mask2Former, MP-Former or MaskFormer file, or a Hugging Face folder, as our checkpoint"
    )
    import_ = _command(commands, "import", weights.weights_import, help)
    import_.add_argument("source", metavar="SRC")
    import_.add_argument("out", metavar="OUT.safetensors")

    export = _command(commands, "export", weights.weights_export, "a checkpoint as a Hugging Face folder")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    export.add_argument("folder", metavar="DIR")

    help = "published models that have a name: source, licence, published figure"
    _command(commands, "list", weights.weights_list, help)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, not '{text}'")


def _command(
    commands: _Commands, name: str, function: Callable[..., None], help: str
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=help, description=help)
    added.set_defaults(function=function, prog=added.prog)
    return added


def _group(commands: _Commands, name: str, help: str) -> _Commands:
    added = commands.add_parser(name, help=help, description=help)
    return added.add_subparsers(required=True, metavar="COMMAND")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("settings", metavar="key=value", nargs="*", help=SETTINGS)


def parse(argv: Sequence[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function that a command line calls, and its arguments.

    `key=value` settings may stand anywhere after the command. An argument that names an existing file or
    folder is a path, also where it looks like a setting or an option; so is the value of an option, and what
    stands behind `--`. Raises `InputError` for a line that is none of ours.
    """
    settings, others = _split(argv)
    try:
        arguments = vars(build_parser().parse_args(others))
    except InputError as error:
        odd = [text for text in argv if place(text) != text and text not in (*VALUED, *FLAGS, "--")]
        hint = f"; if '{odd[0]}' is a path, it is written {place(odd[0])}" if odd else ""
        raise InputError(f"{error}{hint}") from None
    function, prog = arguments.pop("function"), arguments.pop("prog")
    if "settings" in arguments:
        arguments["settings"] = [*arguments["settings"], *settings]
    elif settings:
        raise InputError(f"setting '{settings[0]}': `{prog}` takes no settings")
    return function, arguments


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `key=value` settings among the arguments, and the others in a form that argparse understands."""
    settings: list[str] = []
    others: list[str] = []
    for index, text in enumerate(argv):
        if "--" in argv[:index]:
            others.append(text)
        elif others and (option := others[-1]) == argv[index - 1] and _takes_value(option):
            others[-1:] = [option, text] if text in (*VALUED, *FLAGS, "--") else [f"{option}={text}"]
        elif SETTING.fullmatch(text) and not _exists(text):
            settings.append(text)
        elif text.startswith("-") and text not in (*VALUED, *FLAGS) and _exists(text):
            others.append(place(text))
        else:
            others.append(text)
    return settings, others


def _takes_value(option: str) -> bool:
    """Whether the next argument is this option's value; options may be shortened."""
    return len(option) > 2 and any(valued.startswith(option) for valued in VALUED)


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # a null character
        return False
