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
from mpformer.config.yamlfile import nearest, nearest_path
from mpformer.model.weights.named import require_reachable
from mpformer.types import STRIDE, ClassTable, InputError, round_up

if TYPE_CHECKING:
    import numpy as np

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_LONGEST, _MOST = 8192, 256
"""Pixels of a side, and images: more would exhaust the memory, after minutes."""


@dataclass(frozen=True)
class _Choices:
    """`key=value` of the command."""

    size: tuple[int, int] | None
    """Height and width of the file's images, multiples of 32; None: those of the recipe."""
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
    chosen = _choices(settings)
    if not out.endswith(".onnx") or Path(out).is_dir():
        raise InputError(f"{out}: the name of a file that ends in .onnx is expected")
    if chosen.image is not None and not Path(chosen.image).is_file():
        raise InputError(
            f"setting 'image={chosen.image}': there is no such file{nearest_path(Path(chosen.image))}"
        )
    require_reachable(checkpoint)
    from mpformer.model.export_onnx import export_onnx, require_onnx

    require_onnx()
    import torch

    from mpformer.evaluate.views import prepare_within
    from mpformer.model.weights.loading import load_checkpoint

    model, config = load_checkpoint(chosen_file(checkpoint))
    size = height, width = chosen.size or _default_size(config)
    pictures, source = _pictures(chosen, config, size)
    images = torch.cat([prepare_within(picture, size) for picture in pictures])
    images = images.to(getattr(torch, chosen.dtype))
    count = "any number of" if chosen.batch is None else str(chosen.batch)
    say(f"{checkpoint}: {count} images of {height}x{width}, {chosen.dtype}; compared on {source}")
    notes = _notes(model.classes, config, size)
    export_onnx(model, Path(out), images, notes, batch=chosen.batch, report=say)
    say(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB")


def _notes(classes: ClassTable, config: Config, size: tuple[int, int]) -> dict[str, str]:
    """What the file says of itself: how images go in, what classes are called, how it was tested."""
    from mpformer.data.images import PAD_COLOR

    height, width = size
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


def _choices(settings: Sequence[str]) -> _Choices:
    given: dict[str, str] = {}
    known = ("size", "batch", "input", "image")
    for text in settings:
        key, _, value = text.partition("=")
        if key not in known:
            raise InputError(f"setting '{text}': no such setting here; nearest: {nearest(key, known)}")
        given[key] = value
    size, batch, dtype = given.get("size"), given.get("batch", "1"), given.get("input", "uint8")
    if batch != "any" and not (_is_short(batch) and 0 < int(batch) <= _MOST):
        raise InputError(f"setting 'batch={batch}': a number of images, 1 to {_MOST}, or any, is expected")
    if dtype not in ("uint8", "float32"):
        raise InputError(f"setting 'input={dtype}': uint8 or float32 is expected")
    number = None if batch == "any" else int(batch)
    return _Choices(None if size is None else _size(size), number, dtype, given.get("image"))


def _is_short(text: str) -> bool:
    """Whether it is a number of few digits: of thousands Python makes none."""
    return text.isdecimal() and len(text) < 10


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    sides = found.groups(default=found[1]) if found else ()
    height, width = (int(side) if _is_short(side) else 0 for side in sides) if sides else (0, 0)
    if not all(STRIDE <= side <= _LONGEST and side % STRIDE == 0 for side in (height, width)):
        raise InputError(
            f"setting 'size={text}': HEIGHTxWIDTH in multiples of {STRIDE}, up to {_LONGEST}, is expected, "
            "such as 512x768"
        )
    return height, width


def _default_size(config: Config) -> tuple[int, int]:
    """The crop that the recipe trains on; where it has none of one size, what its test images fit into."""
    crop = getattr(config.data.augment, "size", None)
    if crop is not None:
        return crop
    resize = config.data.test_resize
    side = round_up(resize.long or resize.short or 512, STRIDE)
    return side, side


def _pictures(chosen: _Choices, config: Config, size: tuple[int, int]) -> tuple[list[np.ndarray], str]:
    """As many images [h,w,3] uint8 RGB as a comparison needs, and where they are from.

    size: of those that are generated, where there are no others.
    """
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
    return [picture(max(size), seed) for seed in range(count)], "generated images"
