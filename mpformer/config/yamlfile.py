"""YAML files whose keys remember their line, so that an error can name the place."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from mpformer.config import texts
from mpformer.config.nearest import nearest as nearest
from mpformer.config.run import Config
from mpformer.config.shipped import RECIPES, shipped_files
from mpformer.plugin import is_reference
from mpformer.types import InputError

_OF_COMMAND_LINE = "setting '"
"""How the place of a setting of the command line begins: `setting 'key=value'`."""


def masked(text: str) -> str:
    """A text without the passwords of the addresses in it: messages and logs are not to repeat them."""
    return re.sub(r"(://[^/@\s:]*:)[^/@\s]+@", r"\1***@", text)


@dataclass
class Source:
    """A tree of settings, and of each dotted key the file and line and what is written there."""

    path: Path
    tree: dict[str, Any]
    places: dict[str, str]
    """{'train.lr': 'recipe.yaml:12'}"""
    texts: dict[str, str] = field(default_factory=dict)
    """{'data.root': '2024-01-15'}: of values that stand without quotes and that YAML reads as no text."""

    def place(self, keys: Sequence[str]) -> str:
        """Where a key, or else its nearest enclosing section, was written."""
        for end in range(len(keys), 0, -1):
            if (found := self.places.get(".".join(keys[:end]))) is not None:
                return found
        return str(self.path)

    def given_below(self, keys: Sequence[str]) -> dict[str, str]:
        """The settings of the command line that lie in a section: {dotted key: "setting 'key=value'"}."""
        prefix = "".join(f"{key}." for key in keys)
        return {
            k: p for k, p in self.places.items() if k.startswith(prefix) and p.startswith(_OF_COMMAND_LINE)
        }

    def laid_under(self, over: Source) -> Source:
        """This tree with another laid over it; lists and scalars are replaced whole."""
        both = {**self.places, **over.places}, {**self.texts, **over.texts}
        return Source(over.path, merge(self.tree, over.tree), *both)

    def text(self, key: str, value: Any) -> str:
        """As `value`, which stands under a dotted key, is written."""
        return self.texts.get(key) or str(value)

    def as_written(self, schema: type[BaseModel] = Config) -> dict[str, Any]:
        """The tree with the settings that are text as they are written, whatever YAML reads."""
        return texts.as_written(self.tree, self.texts, schema, parse_scalar)

    def overridden(self, overrides: Sequence[str]) -> Source:
        """With `key.sub=value` settings laid over: those that are text as they stand, others read as YAML."""
        result = Source(self.path, copy.deepcopy(self.tree), dict(self.places), dict(self.texts))
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not key or any(not part for part in key.split(".")):
                raise InputError(f"setting '{text}': expected key.sub=value, for instance train.seed=1")
            parsed = value_of(text)
            result.set(key.split("."), parsed, f"{_OF_COMMAND_LINE}{masked(text)}'")
            if isinstance(parsed, dict | list) and (node := yaml.compose(value, Loader=_Loader)) is not None:
                _collect(node, "", f"{key}.", {}, result.texts)
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
            self._forget_places(keys[:-1])
        node[keys[-1]] = value
        self._forget_places(keys)
        self.places[".".join(keys)] = place

    def _forget_places(self, keys: Sequence[str]) -> None:
        """Of all that lies in a section which has been replaced."""
        prefix = "".join(f"{key}." for key in keys)
        for key in [key for key in self.places if key.startswith(prefix)]:
            del self.places[key]


_TEXT = "tag:yaml.org,2002:str"
_UNQUOTED = re.compile("undefined alias|cannot start any token|mapping values are not allowed")


# not PyYAML's parser in C, which is four times as fast: 100,000 brackets in a file end the process
class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 requires a dot), a date is text, and a duplicate key is
    an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is expected", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{key.value}'", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number; text where it only looks like one, as 0x_ does."""
    try:
        return loader.construct_yaml_int(node)
    except ValueError:
        return node.value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
for _sign in ("value", "merge"):  # a value that is = or <<, which SafeLoader has no reading for
    _Loader.add_constructor(f"tag:yaml.org,2002:{_sign}", lambda loader, node: node.value)
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if not resolver[0].endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"))
    )


class _SettingsLoader(_Loader):
    """With keys that are text, too: a row may be called 2024 or no."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                key.tag = _TEXT
        return super().construct_mapping(node, deep)


def parse_scalar(text: str) -> Any:
    """The value that YAML reads from a text."""
    return yaml.load(text, Loader=_SettingsLoader)  # noqa: S506  (a SafeLoader subclass)


def quoted(text: str) -> str:
    """Text as a settings file, or a bracketed part of one, has it."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=10**9)[1:-2]


def value_of(setting: str, schema: type[BaseModel] = Config) -> Any:
    """The value of `key.sub=value`: where `schema` declares text, the characters as they are, else YAML.

    Raises `InputError` for what is no YAML, and for empty text.
    """
    key, _, text = setting.partition("=")
    try:
        return texts.given(text, schema, key, parse_scalar)
    except yaml.YAMLError as error:
        reason = f"the value is not YAML: {_first_line(error)}"
    except ValueError as error:
        reason = str(error)
    raise InputError(f"setting '{setting}': {reason}")


def read_settings(path: Path, named_by: str = "", among: tuple[str, ...] = RECIPES) -> Source:
    """As `read_yaml`, with keys that are names, whatever YAML would read from them."""
    return read_yaml(path, named_by, among, _SettingsLoader)


def read_yaml(
    path: Path,
    named_by: str = "",
    among: tuple[str, ...] = RECIPES,
    loader_class: type[yaml.SafeLoader] = _Loader,
) -> Source:
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
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            tree = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or _first_line(error)
        hint = "; text with such characters is written in quotes" if _UNQUOTED.search(problem) else ""
        raise InputError(f"{where}: not valid YAML: {problem}{hint}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a mapping of settings is expected, not a {type(tree).__name__}")
    source = Source(path, tree, {})
    if node is not None:
        _collect(node, f"{path}:", "", source.places, source.texts)
    return source


def _collect(
    node: yaml.Node, where: str, prefix: str, places: dict[str, str], written: dict[str, str]
) -> None:
    """The place of every key below a node, and the text of each value that YAML reads as no text."""
    inner: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(index), value, value) for index, value in enumerate(node.value)]
    for name, at, value in inner:
        places[prefix + name] = f"{where}{at.start_mark.line + 1}"
        if isinstance(value, yaml.ScalarNode) and value.tag != _TEXT:
            written[prefix + name] = value.value
        _collect(value, where, f"{prefix}{name}.", places, written)


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
