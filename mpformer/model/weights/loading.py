"""Weights: our own checkpoints, other programs' files in, Hugging Face folders out; nothing is executed.

Whatever is read is matched with the model by name and shape and counted by part. A checkpoint and an import
have to match as a whole; weights to start a training from (`train.init`) may lack what belongs to other
classes, and at most half of any other part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mpformer import atomic
from mpformer.config import Config, Data
from mpformer.config.model import Backbone
from mpformer.config.model import Model as ModelConfig
from mpformer.config.plugins import references
from mpformer.model.architecture import Architecture, build_model
from mpformer.model.weights.catalogue import NamedWeights
from mpformer.model.weights.checkpoints import Choice, choose
from mpformer.model.weights.filekind import container_of
from mpformer.model.weights.huggingface import read_huggingface
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.matching import (
    CLASS_HEAD,
    OF_CLASSES,
    Match,
    check_norms,
    match,
    more_of_a_kind,
    summary,
)
from mpformer.model.weights.named import Remote, hint, is_remote
from mpformer.model.weights.official import ForeignModel, read_official
from mpformer.model.weights.prefixes import Unwrapped, unwrap
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import ClassInfo, ClassTable, InputError, RunError, distinct_color

log = logging.getLogger(__name__)

_FORMAT = "mpformer-1"
_IMPORT = "`mpformer weights import SRC OUT.safetensors` reads files and folders of other programs"


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
    notes: tuple[str, ...] = ()
    """What else is worth knowing, a line each: the wrapper taken off, copies not taken."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} tensors loaded, {len({own for _, own in self.renamed})} under another name",
            *self.notes,
        ]
        for what, names in (("re-initialised", self.reinitialized), ("left over", self.left_over)):
            if names:
                lines.append(f"{len(names)} {what}: {summary(names)}")
        return "\n".join(lines)


def _report(found: Match, notes: Iterable[str]) -> LoadReport:
    return LoadReport(tuple(found.loaded), found.missing, found.left_over, found.renamed, tuple(notes))


def _wrapping(unwrapped: Unwrapped) -> list[str]:
    notes = [f"its names begin with '{unwrapped.prefix}', which was taken off"] if unwrapped.prefix else []
    for copy in unwrapped.copies:
        notes.append(
            f"not taken: the copy under '{copy}'" if copy else "not taken: the copy without a prefix"
        )
    return notes


def checkpoint_metadata(config: Config, classes: ClassTable) -> dict[str, str]:
    """The header of a checkpoint's model file: resolved settings and class table as JSON."""
    return {
        "format": _FORMAT,
        "config": config.model_dump_json(),
        "classes": json.dumps(classes.to_dict()),
    }


def read_metadata(file: Path) -> tuple[Config, ClassTable]:
    """Settings and class table of a checkpoint's model file.

    Raises `InputError` for a file of another program, a damaged one, and settings that are not known here.
    """
    header = _header(file)
    if header is None:
        raise InputError(
            f"{file}: no mpformer checkpoint (its header lacks settings and class table); {_IMPORT}"
        )
    try:
        config = Config.model_validate_json(header["config"])
    except KeyError:
        raise InputError(f"{file}: its header lacks the settings") from None
    except ValueError as error:
        reason = " ".join(str(error).splitlines()[1:3]) or str(error)
        raise InputError(f"{file}: the settings in its header are not valid here: {reason}") from None
    return config, _classes_of(header, file)


def _header(file: Path) -> dict[str, str] | None:
    """The header of an mpformer file; None for a file of another program."""
    if container_of(file) != "safetensors":
        return None
    try:
        with safe_open(file, "pt") as tensors:
            header = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is cut short or damaged: {error}") from None
    return header if header.get("format") == _FORMAT else None


def _classes_of(header: dict[str, str], file: Path) -> ClassTable:
    try:
        return ClassTable.from_dict(json.loads(header["classes"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{file}: the class table in its header is not valid: {error!r}") from None


def weights_file(source: str | Path) -> Path:
    """`chosen_weights`, without the note."""
    return chosen_weights(source).file


def chosen_weights(source: str | Path) -> Choice:
    """The model file that a run, one of its checkpoints, a file of ours or named weights stand for.

    Named weights (a name of `mpformer weights list`, `hf:OWNER/NAME[@REVISION]`, a URL) are fetched and made
    a file of ours once, in the cache; a file or folder of that name wins. Raises `InputError` where there are
    no weights, and what fetching raises (`mpformer.model.weights.fetching`).
    """
    text = str(source)
    if is_remote(text) and (remote := Remote.parse(text)) is not None:
        return Choice(remote.place(_make_ours))
    try:
        return choose(Path(source))
    except InputError as error:
        raise InputError(f"{error}{hint(text)}") from None


def _make_ours(fetched: Path, out: Path, known: NamedWeights | None) -> None:
    """Turn what was fetched into a checkpoint of ours, with what the catalogue knows of it."""
    if fetched.is_file() and _header(fetched) is not None:
        named = [(key, name) for key, name in references(read_metadata(fetched)[0]) if key[:6] != "train."]
        if named:
            key, name = named[0]
            raise InputError(
                f"its settings name code to run ({key}: {name}), which is refused of what was fetched; "
                "download the file yourself if you trust it"
            )
        fetched.replace(out)
        return
    report = import_weights(fetched, out, known)
    log.warning("%s: %s", out.stem, "; ".join([f"{len(report.loaded)} tensors imported", *report.notes]))


def load(source: str | Path, device: torch.device | str = "cpu") -> Architecture:
    """Open a trained model: a run, a file or published weights.

    source: a run's folder, one of its checkpoints, a `.safetensors` file of ours (also what `mpformer weights
    import` wrote), or published weights, which are fetched once: a name that `mpformer weights list` prints,
    `hf:OWNER/NAME[@REVISION]` or a URL.
    device: where the model goes, such as "cuda".

    The model is in evaluation mode. It knows its `classes` (a `ClassTable`: names, which are countable, ids
    at the source) and its `settings` (a `Config`): `settings.data.test_resize` is the size at which it was
    tested, `settings.data.task` what it was trained for. `mpformer.segment` goes by them.

    Raises `InputError` where there are no weights of that name, or they are damaged; `RunError` where named
    weights can neither be found in the cache nor fetched.

    >>> model = mpformer.load("runs/coco-tiny-1a2b3c4d-s0")
    >>> model.classes.names
    ("cat", "dog")
    >>> result = mpformer.segment(model, "image.jpg")
    """
    return load_checkpoint(source, device)[0]


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[Architecture, Config]:
    """The model of a checkpoint in evaluation mode, and its settings.

    `path`: what `weights_file` takes; tensor names may have a known wrapper's prefix. Raises `InputError` for
    anything else, and where a tensor is missing, superfluous or misfits.
    """
    file = weights_file(path)
    config, classes = read_metadata(file)
    model = build_model(config.model.without_pretrained(), classes)
    own = model.state_dict()
    found = match(own, unwrap(read_tensors(file), own.__contains__, file).tensors, _same_name, file)
    if not found.is_whole() or found.left_over:
        surplus = f"; superfluous: {summary(found.left_over, 3)}" if found.left_over else ""
        raise InputError(
            f"{file}: its tensors are not those of the model that its header describes: "
            f"{found.refusal()}{surplus}"
        )
    model.load_state_dict(found.loaded, strict=False)
    model.settings = config
    return model.to(device).eval(), config


def normalized_as(path: str | Path, config: ModelConfig) -> ModelConfig:
    """The settings, without pretrained weights, with the normalisation of images that weights note.

    `path`: as of `load_weights`. Files of other programs and those of before it was noted are of ImageNet's.
    """
    file = weights_file(path)
    stored = read_metadata(file)[0].model.backbone if _header(file) is not None else Backbone()
    return config.without_pretrained().with_backbone(mean=stored.mean, std=stored.std)


def _same_name(name: str) -> tuple[str, ...]:
    return (name,)


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load weights with our names into a model as far as names and shapes fit.

    `path`: what `weights_file` takes, or another file with our names. A class head is taken only for the same
    classes: where both class tables have names, for the same names in the same order, else for the same
    number; it may be absent. Where other classes leave it as it was, the report's notes and a warning say so.
    Of every other part (backbone, encoder, pixel decoder, transformer decoder, mask head) at least half of
    the tensors have to fit, and norms have to be of the same kind. Raises `InputError` otherwise, and then
    leaves the model as it was.
    """
    file = weights_file(path)
    own = model.state_dict()
    unwrapped = unwrap(read_tensors(file), own.__contains__, file)
    stored = unwrapped.tensors
    taken = stored
    if other := _other_classes(model, file, stored):
        taken = {k: v for k, v in stored.items() if not OF_CLASSES.intersection(k.split("."))}
    found = match(own, taken, _same_name, file)
    if not found.loaded:
        raise InputError(f"{file}: none of its {len(stored)} tensors fits the model; {_IMPORT}")
    short = [part for part, (fit, total) in found.counts().items() if part != CLASS_HEAD and fit < total / 2]
    if short:
        alone = "; a backbone's weights are for model.backbone.pretrained" if _backbone_alone(found) else ""
        raise InputError(
            f"{file}: too little of it fits the model's {' and '.join(short)}, at least half is expected: "
            f"{found.refusal()}{alone}"
        )
    check_norms(found)
    model.load_state_dict(found.loaded, strict=False)
    notes = _wrapping(unwrapped)
    if other:
        notes.append(f"{other}: the class head is left as it was initialised")
        log.warning("%s: %s", path, notes[-1])
    return LoadReport(
        tuple(found.loaded),
        found.missing,
        tuple(name for name in stored if name not in own),
        notes=tuple(notes),
    )


def _backbone_alone(found: Match) -> bool:
    return {part for part, (fit, _) in found.counts().items() if fit} == {"backbone"}


def _other_classes(model: nn.Module, file: Path, stored: Mapping[str, torch.Tensor]) -> str:
    """What a file's classes are where they are known to be others than the model's; else empty."""
    if not isinstance(model, Architecture):
        return ""
    own, header = model.classes.names, _header(file)
    if header is None:
        heads = [t.shape[0] - 1 for name, t in stored.items() if name.endswith("class_embed.bias") and t.ndim]
        return f"it has {heads[0]} classes, the model {len(own)}" if heads and heads[0] != len(own) else ""
    theirs = _classes_of(header, file).names
    if len(theirs) != len(own):
        return f"it has {len(theirs)} classes, the model {len(own)}"
    if theirs == own or ClassTable.numbered(len(theirs)).names in (theirs, own):
        return ""
    label = next(i for i, (a, b) in enumerate(zip(theirs, own)) if a != b)
    return f"its class {label} is '{theirs[label]}', the model's is '{own[label]}'"


def import_weights(source: str | Path, out: str | Path, known: NamedWeights | None = None) -> LoadReport:
    """Turn another program's model into a checkpoint file of ours.

    `source`: an official Mask2Former, MP-Former or MaskFormer file (.pkl, .pth) or a Hugging Face folder,
    whose names may have a known wrapper's prefix; `out`: the .safetensors file to write, which holds settings
    and class table besides and so serves as a checkpoint. Batch norm is imported as `frozen_bn`.
    Raises `InputError`, and writes nothing, where the source is unreadable, another kind of model, or lacks
    any tensor of its model; `RunError` where `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a name that ends in .safetensors is expected")
    if source.is_file() and _header(source) is not None:
        raise InputError(f"{source}: is a checkpoint of mpformer already: it is used as it is")
    foreign = read_huggingface(source) if source.is_dir() else read_official(source)
    classes, notes = _class_table(foreign, source, known)
    # the model without memory tells what has to be there; what is written is the file's tensors alone
    with torch.device("meta"):
        own = build_model(foreign.config, classes).state_dict()
    found = match(own, foreign.tensors, foreign.names, source)
    if not found.is_whole():
        raise InputError(f"{source}: not all tensors of its model are there: {found.refusal()}")
    if surplus := more_of_a_kind(found):
        raise InputError(
            f"{source}: has more than the model that it describes: {surplus[:200]!r} is not in it"
        )
    config = Config(name=out.stem, model=foreign.config).model_copy(update=_tested_as(foreign, known))
    _write(out, found.loaded, checkpoint_metadata(config, classes))
    return _report(found, (*_wrapping(foreign.unwrapped), *foreign.notes, *notes))


def _write(out: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(out) as partial:
            # copies: no two may share memory
            save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
                      partial, metadata)  # fmt: skip
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{out}: the weights cannot be written: {reason}") from error


def _tested_as(foreign: ForeignModel, known: NamedWeights | None) -> dict[str, object]:
    """The settings of data and evaluation that weights were published with, as far as that is known."""
    if known is not None:
        told = known.config()
        return {"data": told.data, "evaluate": told.evaluate}
    return {} if foreign.test_resize is None else {"data": Data(test_resize=foreign.test_resize)}


def _class_table(
    foreign: ForeignModel, source: Path, known: NamedWeights | None
) -> tuple[ClassTable, list[str]]:
    """The classes by the names of the file, or numbered where it has none, and a note on that."""
    names, head = foreign.class_names, foreign.class_head()
    count = len(names) or 1 if head is None else head - 1  # without a head the match will fail, and say so
    if count < 1:
        raise InputError(f"{source}: its class head has {head} rows: one per class and one more are expected")
    if known is not None and head is not None:
        classes = known.classes()
        if len(classes) != count:
            raise InputError(
                f"{source}: its class head has {count} classes, the data of {known.recipe} {len(classes)}"
            )
        return classes, []
    if not names:
        return ClassTable.numbered(count), [f"the file names no classes: they are numbered 0 to {count - 1}"]
    if len(names) != count:
        raise InputError(
            f"{source}: id2label in config.json names {len(names)} classes, its class head has {count}"
        )
    return ClassTable(tuple(ClassInfo(n, i, True, distinct_color(i)) for i, n in enumerate(names))), []


def export_huggingface(checkpoint: str | Path, folder: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder that `transformers` loads.

    Raises `InputError` for a model that `transformers` has no equal of.
    """
    model, config = load_checkpoint(checkpoint)
    write_huggingface(model, Path(folder), config.data.test_resize)
