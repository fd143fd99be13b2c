"""YAML files whose keys remember their line, so that an error can name the place."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpformer.config.shipped import RECIPES, shipped_files
from mpformer.plugin import is_reference
from mpformer.types import InputError


@dataclass
class Source:
    """A tree of settings and the file and line of each dotted key."""

    path: Path
    tree: dict[str, Any]
    places: dict[str, str]
    """{'train.lr': 'recipe.yaml:12'}"""

    def place(self, keys: Sequence[str]) -> str:
        """Where a key, or else its nearest enclosing section, was written."""
        for end in range(len(keys), 0, -1):
            if (found := self.places.get(".".join(keys[:end]))) is not None:
                return found
        return str(self.path)

    def laid_under(self, over: Source) -> Source:
        """This tree with another laid over it; lists and scalars are replaced whole."""
        return Source(over.path, merge(self.tree, over.tree), {**self.places, **over.places})

    def overridden(self, overrides: Sequence[str]) -> Source:
        """With `key.sub=value` settings laid over; values are read as YAML."""
        result = Source(self.path, copy.deepcopy(self.tree), dict(self.places))
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not key or any(not part for part in key.split(".")):
                raise InputError(f"setting '{text}': expected key.sub=value, for instance train.seed=1")
            try:
                parsed = parse_scalar(value)
            except yaml.YAMLError as error:
                raise InputError(f"setting '{text}': the value is not YAML: {_first_line(error)}") from None
            result.set(key.split("."), parsed, f"setting '{text}'")
        return result

    def set(self, keys: Sequence[str], value: Any, place: str) -> None:
        """Set one key in place, opening sections on the way."""
        node = self.tree
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {"kind": node[key]} if is_reference(node.get(key)) else {}
            node = node[key]
        if keys[-1] == "kind" and node.get("kind", value) != value:
            node.clear()  # another kind has settings of its own, as in `merge`
        node[keys[-1]] = value
        self.places[".".join(keys)] = place


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 requires a dot) and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{key.value}'", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"))
    )


def parse_scalar(text: str) -> Any:
    """The value of a `key=value` setting."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader subclass)


def read_yaml(path: Path, named_by: str = "", among: tuple[str, ...] = RECIPES) -> Source:
    """Read a YAML file that holds a mapping; `InputError` where it is missing or holds something else.

    `among`: the folders of shipped files whose names are proposed in the place of a missing one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _nearest_file(path, among)
        raise InputError(f"{named_by + ': ' if named_by else ''}no file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            tree = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or _first_line(error)}"
        ) from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a mapping of settings is expected, not a {type(tree).__name__}")
    places: dict[str, str] = {}
    if node is not None:
        _collect_places(node, path, "", places)
    return Source(path, tree, places)


def _collect_places(node: yaml.Node, path: Path, prefix: str, places: dict[str, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            places[name] = f"{path}:{key.start_mark.line + 1}"
            _collect_places(value, path, name + ".", places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[f"{prefix}{index}"] = f"{path}:{value.start_mark.line + 1}"
            _collect_places(value, path, f"{prefix}{index}.", places)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, mappings merged key by key.

    One of another `kind` (a data set: `format`) replaces the whole.
    """
    if any(tag in over and over[tag] != under.get(tag, over[tag]) for tag in ("kind", "format")):
        return copy.deepcopy(over)
    result = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else copy.deepcopy(value)
    return result


def nearest(wrong: str, names: Iterable[str], sections: bool = False) -> str:
    """The name most similar to `wrong`; with `sections`, dotted prefixes of names are candidates, too."""
    candidates = set(names)
    if sections:
        for name in list(candidates):
            parts = name.split(".")
            candidates.update(".".join(parts[:i]) for i in range(1, len(parts)))
    depth = wrong.count(".")
    last = wrong.rsplit(".", 1)[-1]

    def likeness(name: str) -> tuple[float, int, str]:
        whole = difflib.SequenceMatcher(None, wrong, name).ratio()
        end = difflib.SequenceMatcher(None, last, name.rsplit(".", 1)[-1]).ratio()
        return (whole + end, -abs(name.count(".") - depth), name)

    return max(candidates, key=likeness, default="none")


def nearest_path(path: Path, *, folder: bool = False) -> str:
    """The end of a message on a missing path: the most similar file of its suffix, or folder, beside it."""
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no folder {parent})"
    names = [p.name for p in parent.iterdir() if (p.is_dir() if folder else p.suffix == path.suffix)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; nearest: {parent / close[0]}" if close else ""


def _nearest_file(path: Path, among: tuple[str, ...]) -> str:
    """What to propose in the place of a missing file: one beside it, or a shipped one by its bare name."""
    beside = [p.name for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml")]
    if close := difflib.get_close_matches(path.name, beside, n=1, cutoff=0.4):
        return f"; nearest: {path.parent / close[0]}"
    missing = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
    close = difflib.get_close_matches(path.name.removesuffix(".yaml"), shipped_files(among), n=1)
    return f"{missing}; nearest: {close[0]}" if close else missing


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
