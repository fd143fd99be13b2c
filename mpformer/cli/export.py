"""What `mpformer export` does. Heavy parts are imported where they are used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpformer import __version__
from mpformer.cli.checkpoints import chosen_file
from mpformer.cli.output import say
from mpformer.config import Config
from mpformer.config.yamlfile import nearest
from mpformer.model.weights.named import require_reachable
from mpformer.types import STRIDE, ClassTable, InputError, round_up

if TYPE_CHECKING:
    import numpy as np

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class _Choices:
    """`key=value` of the command."""

    size: tuple[int, int]
    """Height and width of the file's images, multiples of 32."""
    batch: int | None
    """How many images it takes; None: any number."""
    dtype: str
    """uint8 or float32."""
    image: str | None
    """A file to compare on."""


def export(checkpoint: str, out: str, settings: Sequence[str]) -> None:
    """A checkpoint as an ONNX file, which is compared with the model in ONNX Runtime before it is written.

    `settings`: size=HEIGHTxWIDTH (default: the crop of the recipe), batch=1|N|any, input=uint8|float32, and
    image=FILE to compare on (default: images of the validation split; generated ones where it is not there).
    """
    require_reachable(checkpoint)
    from mpformer.model.export_onnx import export_onnx, require_onnx

    if not out.endswith(".onnx"):
        raise InputError(f"{out}: a name that ends in .onnx is expected")
    require_onnx()
    import torch

    from mpformer.evaluate.views import prepare_within
    from mpformer.model.weights.loading import load_checkpoint

    model, config = load_checkpoint(chosen_file(checkpoint))
    chosen = _choices(settings, config)
    pictures, source = _pictures(chosen, config)
    images = torch.cat([prepare_within(picture, chosen.size) for picture in pictures])
    images = images.to(getattr(torch, chosen.dtype))
    height, width = chosen.size
    count = "any number of" if chosen.batch is None else str(chosen.batch)
    say(f"{checkpoint}: {count} images of {height}x{width}, {chosen.dtype}; compared on {source}")
    export_onnx(
        model, Path(out), images, _notes(model.classes, config, chosen), batch=chosen.batch, report=say
    )
    say(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB")


def _notes(classes: ClassTable, config: Config, chosen: _Choices) -> dict[str, str]:
    """What the file says of itself: how images go in, what classes are called, how it was tested."""
    from mpformer.data.images import PAD_COLOR

    height, width = chosen.size
    return {
        "mpformer": __version__,
        "recipe": config.name,
        "task": config.data.task,
        "classes": json.dumps(classes.to_dict()),
        "images": f"[B,3,{height},{width}] RGB, 0..255; the aspect kept, in the upper left corner",
        "pad_color": json.dumps(PAD_COLOR),
        "test_resize": config.data.test_resize.model_dump_json(),
        "evaluate": config.evaluate.model_dump_json(),
    }


def _choices(settings: Sequence[str], config: Config) -> _Choices:
    given: dict[str, str] = {}
    known = ("size", "batch", "input", "image")
    for text in settings:
        key, _, value = text.partition("=")
        if key not in known:
            raise InputError(f"setting '{text}': no such setting here; nearest: {nearest(key, known)}")
        given[key] = value
    size, batch, dtype = given.get("size"), given.get("batch", "1"), given.get("input", "uint8")
    if batch != "any" and not (batch.isdecimal() and int(batch) > 0):
        raise InputError(f"setting 'batch={batch}': a number of images, or any, is expected")
    if dtype not in ("uint8", "float32"):
        raise InputError(f"setting 'input={dtype}': uint8 or float32 is expected")
    return _Choices(
        _default_size(config) if size is None else _size(size),
        None if batch == "any" else int(batch),
        dtype,
        given.get("image"),
    )


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    sides = [int(side) for side in found.groups(default=found[1])] if found else [0, 0]
    if min(sides) < STRIDE or any(side % STRIDE for side in sides):
        raise InputError(
            f"setting 'size={text}': HEIGHTxWIDTH in multiples of {STRIDE} is expected, such as 512x768"
        )
    return sides[0], sides[1]


def _default_size(config: Config) -> tuple[int, int]:
    """The crop that the recipe trains on; where it has none of one size, what its test images fit into."""
    crop = getattr(config.data.augment, "size", None)
    if crop is not None:
        return crop
    resize = config.data.test_resize
    side = round_up(resize.long or resize.short or 512, STRIDE)
    return side, side


def _pictures(chosen: _Choices, config: Config) -> tuple[list[np.ndarray], str]:
    """As many images [h,w,3] uint8 RGB as a comparison needs, and where they are from."""
    from mpformer.data.catalog import open_split
    from mpformer.data.images import load_image, read_image
    from mpformer.data.synthetic import picture

    count = chosen.batch or 2
    if chosen.image is not None:
        image = read_image(chosen.image, config.data.bits or 16)
        # the others are other images, too
        return [image if i % 2 == 0 else image[:, ::-1].copy() for i in range(count)], chosen.image
    try:
        split = open_split(config.data, "val")
        images = [load_image(record) for record in split.records[:count] if not record.problem]
    except InputError:  # the data are elsewhere: the comparison does without
        images = []
    if images:
        return [images[i % len(images)] for i in range(count)], f"{len(images)} images of {split.name}"
    return [picture(max(chosen.size), seed) for seed in range(count)], "generated images"
