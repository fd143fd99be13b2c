"""Which tensors of a file are those of a model, counted by part; the line that says what does not match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpformer.config.yamlfile import nearest
from mpformer.model.weights.names import Names
from mpformer.model.weights.tensorfile import shown
from mpformer.types import InputError

OF_CLASSES = frozenset({"class_embed", "predictor", "pilot_embed"})
"""Modules with a row per class."""

CLASS_HEAD = "class head"
_PARTS = {"backbone": "backbone", "encoder": "encoder", "pixel_decoder": "pixel decoder"}
_COUNTER = "num_batches_tracked"
"""Of live batch norm: decides nothing unless statistics are plain averages, and other files may lack it."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STATISTICS = "running_mean"


@dataclass(frozen=True)
class Match:
    """What of a model's state dict is in a file."""

    file: Path
    loaded: dict[str, Tensor]
    """Our names, in the model's order, with the file's values in the model's dtypes."""
    missing: tuple[str, ...]
    """Our names of what is absent, or misfits."""
    misfits: dict[str, str]
    """Our names of what is there with another shape or type, and what the difference is."""
    left_over: tuple[str, ...]
    """The file's names that were not used."""
    renamed: tuple[tuple[str, str], ...]
    """(name in the file, our name), where the two differ."""
    expected: dict[str, Names]
    """The file's names of what is missing."""

    def counts(self) -> dict[str, tuple[int, int]]:
        """(in the file, in the model) of each part's tensors."""
        total = Counter(part_of(n) for n in (*self.loaded, *self.missing) if not n.endswith(_COUNTER))
        loaded = Counter(part_of(n) for n in self.loaded if not n.endswith(_COUNTER))
        return {part: (loaded[part], total[part]) for part in total}

    def is_whole(self) -> bool:
        """Whether everything that decides what the model computes is there."""
        return all(name.endswith(_COUNTER) for name in self.missing)

    def refusal(self) -> str:
        """One line: the counts by part, and the first thing that is missing with the nearest there is."""
        counts = ", ".join(f"{part} {fit} of {total}" for part, (fit, total) in self.counts().items())
        return f"{counts}{self._first_difference()}"

    def _first_difference(self) -> str:
        if self.misfits:
            difference = next(iter(self.misfits.values()))
            return f"; {difference}" + (f" ({len(self.misfits)} such)" if len(self.misfits) > 1 else "")
        absent = [n for n in self.missing if not n.endswith(_COUNTER)]
        if not absent:
            return ""
        wanted = (self.expected.get(absent[0]) or (absent[0],))[0]
        if not self.left_over:
            return f"; {shown(wanted)} is missing"
        # long enough lists of long names would take minutes to compare
        candidates = [name for name in self.left_over[:3000] if len(name) < 300]
        return f"; {shown(wanted)} is missing, nearest there: {shown(nearest(wanted, candidates))}"


def match(
    own: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    names_of: Callable[[str], Names | None],
    file: Path,
) -> Match:
    """Look up a model's tensors (its state dict, which may be without memory) in a file's.

    `names_of`: our name of a tensor to those in the file; several are laid one after the other along the
    first dimension. Raises `InputError` where a value that fits is not finite.
    """
    loaded: dict[str, Tensor] = {}
    misfits: dict[str, str] = {}
    renamed: list[tuple[str, str]] = []
    used: set[str] = set()
    expected: dict[str, Names] = {}
    for name, tensor in own.items():
        names = names_of(name) or ()
        if not names or not all(n in stored for n in names):
            expected[name] = tuple(n for n in names if n not in stored)
            continue
        parts = [stored[n] for n in names]
        difference = _difference(tensor, parts)
        if difference:
            misfits[name] = f"{shown(names[0])} is {difference}"
            continue
        value = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(tensor.dtype)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{file}: {shown(names[0])} holds NaN or infinite numbers")
        loaded[name] = value
        used.update(names)
        renamed.extend((n, name) for n in names if n != name)
    return Match(
        file,
        loaded,
        tuple(name for name in own if name not in loaded),
        misfits,
        tuple(name for name in stored if name not in used),
        tuple(renamed),
        expected,
    )


def _difference(own: Tensor, parts: list[Tensor]) -> str | None:
    """How the parts, laid one after the other, differ from our tensor in shape or type; None: not at all."""
    for part in parts:
        if own.is_floating_point() and part.dtype not in _FLOATS:
            return f"{_plain(part.dtype)} there, a float is expected"
        if not own.is_floating_point() and part.dtype.is_floating_point:
            return f"{_plain(part.dtype)} there, {_plain(own.dtype)} is expected"
    # laid along the first dimension, which a number alone lacks
    if len(parts) > 1 and (any(p.ndim == 0 for p in parts) or len({p.shape[1:] for p in parts}) > 1):
        return f"{[list(p.shape) for p in parts]} there, {list(own.shape)} in all is expected"
    shape = list(parts[0].shape)
    if len(parts) > 1:
        shape[0] = sum(p.shape[0] for p in parts)
    return None if shape == list(own.shape) else f"{shape} there, {list(own.shape)} is expected"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to, in words: what a partial match is counted by."""
    first, *rest = name.split(".")
    if OF_CLASSES.intersection(rest):
        return CLASS_HEAD
    if first == "decoder":
        return "mask head" if {"mask_embed", "box_embed"}.intersection(rest) else "transformer decoder"
    return _PARTS.get(first, first if rest else "model")


def check_norms(found: Match) -> None:
    """Raise `InputError` where one side's norms have running statistics and the other's have none.

    Scale and shift of the two kinds have the same names and shapes, and mean different things.
    """
    affine = {name.rpartition(".")[0] for name in found.loaded}
    absent = [n for n in found.missing if n.endswith(_STATISTICS) and n.rpartition(".")[0] in affine]
    if absent:
        raise InputError(
            f"{found.file}: its norms have no running statistics ({shown(absent[0])} is missing), unlike "
            "the model's: model.backbone.norm=group_norm is expected"
        )
    surplus = [n for n in found.left_over if n.endswith(_STATISTICS) and n.rpartition(".")[0] in affine]
    if surplus:
        raise InputError(
            f"{found.file}: its norms have running statistics ({shown(surplus[0])}), the model's have none: "
            "model.backbone.norm=frozen_bn or bn is expected"
        )


def more_of_a_kind(found: Match) -> str | None:
    """The first unused name that differs in its numbers alone from a used one: of one layer more, say."""
    theirs = {own: name for name, own in found.renamed}
    used = {_kind(theirs.get(name, name)) for name in found.loaded}
    return next((name for name in found.left_over if _kind(name) in used), None)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def summary(names: Iterable[str], most: int = 12) -> str:
    """Names that differ in numbers only as one, with their count; at most that many, then how many more."""
    groups = Counter(re.sub(r"\b\d+\b", "*", " ".join(name.split())) for name in names)
    listed = [f"{n} ({count})" if count > 1 else n for n, count in list(groups.items())[:most]]
    rest = sum(list(groups.values())[most:])
    return ", ".join(listed) + (f" and {rest} more" if rest else "")
