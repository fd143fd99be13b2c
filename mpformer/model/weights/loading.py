"""Weights: our own checkpoints, other programs' files in, Hugging Face folders out; nothing is executed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mpformer.config import Config
from mpformer.model.architecture import Architecture, build_model
from mpformer.model.weights.checkpoints import model_file
from mpformer.model.weights.huggingface import read_huggingface, write_huggingface
from mpformer.model.weights.official import read_official
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

_FORMAT = "mpformer-1"


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor, by name."""

    loaded: tuple[str, ...]
    """Our names."""
    reinitialized: tuple[str, ...]
    """In the model but absent from the file, or of another shape there: left as they were."""
    left_over: tuple[str, ...]
    """In the file but not in the model."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(name in the file, our name), where the two differ."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} tensors loaded, {len({own for _, own in self.renamed})} under another name"
        ]
        for what, names in (("re-initialised", self.reinitialized), ("left over", self.left_over)):
            if names:
                lines.append(f"{len(names)} {what}: {_summary(names)}")
        return "\n".join(lines)


def _summary(names: Iterable[str]) -> str:
    """Names that differ in numbers only as one, with their count."""
    groups = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())


def checkpoint_metadata(config: Config, classes: ClassTable) -> dict[str, str]:
    """The header of a checkpoint's model file: resolved settings and class table as JSON."""
    return {
        "format": _FORMAT,
        "config": config.model_dump_json(),
        "classes": json.dumps(classes.to_dict()),
    }


def read_metadata(file: Path) -> tuple[Config, ClassTable]:
    """Settings and class table of a checkpoint's model file."""
    try:
        with safe_open(file, "pt") as tensors:
            header = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from None
    if header.get("format") != _FORMAT:
        raise InputError(f"{file}: no mpformer checkpoint (its header lacks settings and class table)")
    config = Config.model_validate_json(header["config"])
    return config, ClassTable.from_dict(json.loads(header["classes"]))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[Architecture, Config]:
    """The model of a checkpoint in evaluation mode, and its settings.

    `path`: a run, a checkpoint folder or its model file. Raises `InputError` for anything else.
    """
    file = model_file(Path(path))
    config, classes = read_metadata(file)
    model = build_model(config.model.without_pretrained(), classes)
    model.load_state_dict(load_file(file))
    return model.to(device).eval(), config


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load a safetensors file of our names into a model as far as names and shapes fit.

    A class head is taken only for the same classes: where both class tables have names, for the same names
    in the same order, else for the same number. Raises `InputError` where nothing fits.
    """
    file = model_file(Path(path))
    stored = read_tensors(file)
    own = model.state_dict()
    fitting = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape}
    if _other_classes(model, file):
        fitting = {k: v for k, v in fitting.items() if not _OF_CLASSES.intersection(k.split("."))}
    if not fitting:
        raise InputError(
            f"{file}: none of its {len(stored)} tensors fits the model; `mpformer weights import` reads "
            "files of other programs"
        )
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        tuple(fitting), tuple(k for k in own if k not in fitting), tuple(k for k in stored if k not in own)
    )


_OF_CLASSES = frozenset({"class_embed", "predictor", "pilot_embed"})
"""Modules with a row per class."""


def _other_classes(model: nn.Module, file: Path) -> bool:
    """Whether a file is known to be of other classes than the model."""
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata() or {}
    if header.get("format") != _FORMAT or not isinstance(model, Architecture):
        return False
    theirs = ClassTable.from_dict(json.loads(header["classes"])).names
    numbered = ClassTable.numbered(len(theirs)).names
    return theirs != model.classes.names and numbered not in (theirs, model.classes.names)


def import_weights(source: str | Path, out: str | Path) -> LoadReport:
    """Turn another program's model into a checkpoint file of ours.

    `source`: an official Mask2Former, MP-Former or MaskFormer file (.pkl, .pth) or a Hugging Face folder;
    `out`: the .safetensors file to write, which holds settings and class table besides and so serves as a
    checkpoint.
    Raises `InputError` where the source is unreadable or another kind of model.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a name that ends in .safetensors is expected")
    if source.is_dir():
        foreign = read_huggingface(source)
    else:
        foreign = read_official(source)
    head = next(t for name, t in foreign.tensors.items() if name.endswith(_CLASS_HEADS))
    classes = _class_table(foreign.class_names, head.shape[0] - 1)
    model = build_model(foreign.config, classes)
    own = model.state_dict()
    loaded: dict[str, torch.Tensor] = {}
    renamed: list[tuple[str, str]] = []
    for name, tensor in own.items():
        names = foreign.names(name) or ()
        if names and all(n in foreign.tensors for n in names):
            value = torch.cat([foreign.tensors[n] for n in names]).to(tensor.dtype)
            if value.shape == tensor.shape:
                loaded[name] = value
                renamed.extend((n, name) for n in names if n != name)
    used = {n for name in loaded for n in foreign.names(name) or ()}
    model.load_state_dict(loaded, strict=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    config = Config(name=out.stem, model=foreign.config)
    save_file(model.state_dict(), out, checkpoint_metadata(config, classes))
    return LoadReport(
        tuple(loaded),
        tuple(k for k in own if k not in loaded),
        tuple(k for k in foreign.tensors if k not in used),
        tuple(renamed),
    )


_CLASS_HEADS = ("class_predictor.bias", "predictor.class_embed.bias")


def _class_table(names: tuple[str, ...], count: int) -> ClassTable:
    """The named classes, or numbered ones where the file gives no name to each."""
    if len(names) != count:
        return ClassTable.numbered(count)
    return ClassTable(tuple(ClassInfo(n, i, True, distinct_color(i)) for i, n in enumerate(names)))


def export_huggingface(checkpoint: str | Path, folder: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder that `transformers` loads.

    Raises `InputError` for a model that `transformers` has no equal of.
    """
    model, config = load_checkpoint(checkpoint)
    write_huggingface(model, Path(folder), config.data.test_resize)
