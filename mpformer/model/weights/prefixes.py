"""Wrappers around a model's tensors: what training programs put before every name, taken off again.

`torch.nn.DataParallel` writes `module.`, Lightning `model.` within `state_dict`, `torch.compile`
`_orig_mod.`, programs that average the weights a second copy under `ema.`. A wrapper is taken off only where
it is known and the names behind it are those of the model; what stands under any other is told, not guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mpformer.model.weights.tensorfile import shown
from mpformer.types import InputError

WRAPPERS = (
    *("model", "module", "state_dict", "model_state_dict", "model_state", "net", "network", "student"),
    *("params", "weights"),
    *("ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "ema_state", "params_ema"),
    "teacher",
)
"""Known wrappers. Where a file holds several copies of a model, the first of these is taken: trained weights
before their average, a student before its teacher."""

_INSIDE = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What torch inserts anywhere in a name; no module of a model is called so."""

_NEARLY_ALL = 0.9
_SOME = 0.1
_DEPTH = 8


@dataclass(frozen=True)
class Unwrapped:
    """The tensors of a model by their plain names."""

    tensors: dict[str, Tensor]
    """Those under the wrapper without it; all others of the file as they are called there."""
    prefix: str = ""
    """What was taken off, with its dot; '' for nothing."""
    copies: tuple[str, ...] = ()
    """Other wrappers in the file that hold the same names; their tensors are left out of `tensors`."""


def unwrap(tensors: Mapping[str, Tensor], is_wanted: Callable[[str], bool], file: Path) -> Unwrapped:
    """Take the known wrapper off that nearly all of the wanted names in a file have.

    `is_wanted` tells the names of the model. Raises `InputError` where the wanted names stand under a wrapper
    that is not known, or partly under one and partly not.
    """
    plain = _without_torch_wrappers(tensors, file)
    found = _by_prefix(plain, is_wanted)
    most = max((len(rests) for rests in found.values()), default=0)
    if not found or most < _SOME * len(plain):
        return Unwrapped(plain)  # of another model; single names, such as 'norm.weight', may still agree
    full = [prefix for prefix, rests in found.items() if len(rests) >= _NEARLY_ALL * most]
    known = [prefix for prefix in full if _is_known(prefix)]
    if not known:
        raise InputError(
            f"{file}: its names begin with {shown(full[0])}, which is no known wrapper "
            f"({', '.join(WRAPPERS)}): rename its tensors to {shown(min(found[full[0]]))}, ..."
        )
    prefix = min(known, key=_rank)
    wanted = found[prefix]
    copies = tuple(p for p in found if p != prefix and len(found[p] & wanted) >= len(wanted) / 2)
    _check_in_one_place(found, prefix, copies, file)
    result: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if prefix and name.startswith(prefix):
            result[name.removeprefix(prefix)] = tensor
        elif not any(name.startswith(p) for p in copies if p) and not (prefix and name in wanted):
            result.setdefault(name, tensor)
    return Unwrapped(result, prefix, copies)


def _check_in_one_place(
    found: Mapping[str, set[str]], prefix: str, copies: tuple[str, ...], file: Path
) -> None:
    """Raise `InputError` where much of the model is elsewhere than under `prefix`.

    A few names may be: a head, say, that was put on when the rest had its wrapper already.
    """
    wanted = found[prefix]
    elsewhere = {p: rests - wanted for p, rests in found.items() if p != prefix and p not in copies}
    other = max(elsewhere, key=lambda p: len(elsewhere[p]), default=None)
    if other is None or len(elsewhere[other]) <= (1 - _NEARLY_ALL) * (len(wanted) + len(elsewhere[other])):
        return
    places = [
        f"{len(rests)} names {f'under {shown(p)}' if p else 'without a prefix'}, such as "
        f"{shown(p + min(rests))}"
        for p, rests in ((prefix, wanted), (other, elsewhere[other]))
    ]
    raise InputError(f"{file}: one model is expected in one place, it is in two: {' and '.join(places)}")


def _by_prefix(names: Mapping[str, Tensor], is_wanted: Callable[[str], bool]) -> dict[str, set[str]]:
    """For each beginning, dot included, the wanted names behind it."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for i in range(min(len(parts), _DEPTH)):
            rest = ".".join(parts[i:])
            if is_wanted(rest):
                found["".join(f"{part}." for part in parts[:i])].add(rest)
    return dict(found)


def _is_known(prefix: str) -> bool:
    return all(part in WRAPPERS for part in prefix.split(".")[:-1])


def _rank(prefix: str) -> tuple[int, int]:
    """The preference of a copy: by its most derived wrapper, then the shortest."""
    parts = prefix.split(".")[:-1]
    return max((WRAPPERS.index(part) for part in parts), default=-1), len(parts)


def _without_torch_wrappers(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _INSIDE)
        if short in result:
            raise InputError(
                f"{file}: holds the tensor {shown(short)} twice, with and without torch's wrappers"
            )
        result[short] = tensor
    return result
