"""The whole surface of the command line: commands, their arguments, and `key=value` settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from mpformer import __version__
from mpformer.config.yamlfile import nearest
from mpformer.types import InputError

SETTINGS = "settings to change, for instance train.lr=2e-4"
BENCH = "how fast the data comes, stage by stage and through the loader, with no model"
CHECK = "what a data set holds and what is wrong with it, in words"
PACK = "a data set as Parquet shards, for disks and object stores"
SAMPLES = "pictures of images with their masks, and of training samples as the model gets them"
IMPORT = "an official Mask2Former, MP-Former or MaskFormer file, or a Hugging Face folder, as our checkpoint"
EXPORT = "a checkpoint as a Hugging Face folder"
IMAGES = "image files or folders; and key=value settings, for instance evaluate.batch=8"
SYNTH = "generate a data set in COCO's layout: train=400 val=60 seed=0 size=128 things=5"
PLACES = {
    "RECIPE": "a recipe: a file, or the name of a shipped one, such as coco-tiny",
    "STUDY": "a study: a file, or the name of a shipped one, such as mpformer-table8",
    "RUN": "a run's folder, runs/NAME-HASH-sSEED",
    "CHECKPOINT": "a run's folder, one of its checkpoints, or a .safetensors file of ours",
}


_SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message = f"no command '{wrong[1]}'; nearest: {nearest(wrong[1], re.findall('[a-z]+', wrong[2]))}"
        if message.endswith("required: COMMAND"):
            message = "a command is expected; mpformer --help lists them"
        raise InputError(f"{message} (usage: {' '.join(self.format_usage().split()[1:])})")


def build_parser() -> argparse.ArgumentParser:
    """The whole surface; a test freezes it. Settings are `key=value`: there are hardly any flags."""
    parser = _Parser(prog="mpformer", description="Experiments with mask-piloted segmentation transformers.")
    parser.add_argument("--version", action="version", version=f"mpformer {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *places: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=help, description=help)
        for place in places:
            added.add_argument(place.lower(), metavar=place, help=PLACES[place])
        return added

    quickstart = command("quickstart", "a small generated data set, then Mask2Former against MP-Former on it")
    train = command("train", "one run; the same command again resumes it", "RECIPE")
    ablate = command("ablate", "a table; the same command again resumes it", "STUDY")
    ablate.add_argument("--plan", action="store_true", help="only say what would be done")
    ablate.add_argument("--only", metavar="ROW", help="the runs of one row, or of several: A,B")
    report = command("report", "tables, training-speed curves, one HTML page; of a study or a run", "STUDY")
    command("sync", "bring to MLflow what it could not take", "RUN")
    evaluate = command("evaluate", "AP / PQ / mIoU, images/s, peak memory", "CHECKPOINT")
    evaluate.add_argument("--data", metavar="D", help="a data folder, or a recipe to take the data of")
    diagnose = command(
        "diagnose", "the layers' consistency: Table 1 of the paper, Figure 1 pictures", "CHECKPOINT"
    )
    diagnose.add_argument("--data", metavar="D", help="a data folder, or a recipe to take the data of")
    predict = command("predict", "overlay PNG and COCO-style JSON of image files or folders", "CHECKPOINT")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGES)
    predict.add_argument("--out", metavar="DIR", required=True)
    predict.set_defaults(settings=[])  # key=value, too, but argparse allows one open-ended list only
    data = command("data", "data sets").add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    synth = data.add_parser("synth", help=SYNTH, description=SYNTH)
    synth.add_argument("out", metavar="OUT")
    check = data.add_parser("check", help=CHECK, description=CHECK)
    check.add_argument("data", metavar="D", help="a data folder, or a recipe")
    pack = data.add_parser("pack", help=PACK, description=PACK)
    pack.add_argument("data", metavar="D", help="a data folder, or a recipe")
    pack.add_argument("out", metavar="OUT", help="a folder, or s3://bucket/folder")
    samples = data.add_parser("show", help=SAMPLES, description=SAMPLES)
    samples.add_argument("data", metavar="D", help="a data folder, or a recipe")
    samples.add_argument("--out", metavar="DIR", required=True)
    bench = data.add_parser("bench", help=BENCH, description=BENCH)
    bench.add_argument("data", metavar="D", help="a data folder, or a recipe")
    weights = command("weights", "other programs' models")
    forms = weights.add_subparsers(dest="weights_command", required=True, metavar="COMMAND")
    take = forms.add_parser("import", help=IMPORT, description=IMPORT)
    take.add_argument("source", metavar="SRC")
    take.add_argument("out", metavar="OUT.safetensors")
    give = forms.add_parser("export", help=EXPORT, description=EXPORT)
    give.add_argument("checkpoint", metavar="CHECKPOINT", help=PLACES["CHECKPOINT"])
    give.add_argument("folder", metavar="DIR")
    command("doctor", "what is installed, which deformable-attention kernel runs here and why")
    show = command("show", "the resolved settings of a recipe, or the difference of two", "RECIPE")
    show.add_argument("recipe2", metavar="RECIPE2", nargs="?")
    for takes_settings in (
        quickstart,
        train,
        ablate,
        report,
        evaluate,
        diagnose,
        synth,
        check,
        pack,
        samples,
        bench,
        show,
    ):
        takes_settings.add_argument("settings", metavar="key=value", nargs="*", help=SETTINGS)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a command line; `key=value` settings may stand anywhere after the command.

    Raises `InputError` for what is no command line of ours.
    """
    settings = [text for text in argv if _SETTING.fullmatch(text)]
    arguments = build_parser().parse_args([text for text in argv if text not in settings])
    if settings and not hasattr(arguments, "settings"):
        raise InputError(f"setting '{settings[0]}': `mpformer {arguments.command}` takes no settings")
    arguments.settings = [*getattr(arguments, "settings", []), *settings]
    return arguments
