"""Parameters and FLOPs of a recipe's model, counted in a process of its own, so that `show` needs no torch.

mpformer show RECIPE    runs    python -m mpformer.cli.size < settings.json
"""

from __future__ import annotations

import json
import subprocess
import sys

from mpformer.config import Config

ASSUMED_CLASSES = 80
"""COCO's, where the data set is unavailable."""


def size_line(config: Config) -> str:
    """One line: parameters, multiply-adds and the input they are for; or why they cannot be counted."""
    done = subprocess.run(
        [sys.executable, "-m", "mpformer.cli.size"],
        input=json.dumps(config.model_dump(mode="json")),  # ASCII, whatever the encoding of pipes
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"size not known: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return done.stdout.strip()


def _classes(config: Config) -> tuple[int, str]:
    from mpformer.data.catalog import open_split
    from mpformer.types import InputError

    listed = getattr(config.data.dataset, "classes", None)
    if listed:
        return len(listed), f"{len(listed)} classes"
    try:
        found = len(open_split(config.data, "val").classes)
    except InputError:
        return ASSUMED_CLASSES, f"{ASSUMED_CLASSES} classes (assumed: data set unavailable)"
    return found, f"{found} classes"


def _count(config: Config) -> str:
    from mpformer.model.counting import count_size

    classes, named = _classes(config)
    height, width = getattr(config.data.augment, "size", (1024, 1024))
    size = count_size(config.model, classes, height, width, config.data.task)
    return (
        f"{size.parameters / 1e6:.1f} M parameters, {size.flops / 1e9:.1f} G multiply-adds for an image of "
        f"{height} x {width}, {named}{_normalization(config)}"
    )


def _normalization(config: Config) -> str:
    """How images are normalised; a plug-in does that as it likes."""
    if config.model.architecture != "mask2former":
        return ""
    from mpformer.model.backbone import normalization

    backbone = normalization(config.model.backbone)
    mean, std = (
        ", ".join(f"{value:g}" for value in values or ()) for values in (backbone.mean, backbone.std)
    )
    return f"; channels minus {mean}, divided by {std}"


if __name__ == "__main__":
    print(_count(Config.model_validate_json(sys.stdin.read())))
