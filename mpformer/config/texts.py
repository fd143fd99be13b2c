"""Which settings are text: taken as it is written, where YAML would read a date, a number or a comment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from mpformer.config.members import Member, at, inside, members

NAMES_OF_FILES = ("data.dataset",)
"""Settings that are sections, but may name a file that holds the section."""


def declared(schema: type[BaseModel], keys: Sequence[str]) -> list[Any]:
    """The types that a setting may have: of every member of the unions on the way; empty for no setting."""
    types = _types(at(schema, keys))
    return [*types, str] if ".".join(keys) in NAMES_OF_FILES else types


def given(text: str, schema: type[BaseModel], key: str, parse: Callable[[str], Any]) -> Any:
    """The value of `key=text` of a command line: as it stands where text is expected, else by `parse`.

    `null` is None where the setting may be that, and what begins with a bracket is parsed where it may be a
    list or a mapping. Raises `ValueError` for empty text, and what `parse` raises.
    """
    types = declared(schema, key.split("."))
    if str not in types or (text[:1] in ("[", "{") and any(map(_is_composite, types))):
        return parse(text)
    if not text:
        raise ValueError("text is expected after '='" + " (null for none)" * (NoneType in types))
    return None if text == "null" and NoneType in types else text


def as_written(
    tree: dict[str, Any], texts: Mapping[str, str], schema: type[BaseModel], parse: Callable[[str], Any]
) -> dict[str, Any]:
    """A tree of settings in which those that are text have the characters of their file.

    texts: by dotted key, how a value is written that YAML has read as something else. It is used only where
    the tree still has that value, not one that was laid over it.
    """

    def resolved(value: Any, found: list[Member], key: str) -> Any:
        if isinstance(value, dict):
            return {k: resolved(v, inside(found, k), f"{key}.{k}" if key else k) for k, v in value.items()}
        if isinstance(value, list):
            return [resolved(v, inside(found, str(i)), f"{key}.{i}") for i, v in enumerate(value)]
        text = texts.get(key)
        return text if text and _is_text(text, value, _types(found)) and parse(text) == value else value

    return resolved(tree, [Member(schema)], "")


def _types(found: Iterable[Member]) -> list[Any]:
    return [member.type for one in found for member in members(one.type, one.metadata)]


def _is_text(text: str, value: Any, types: Sequence[Any]) -> bool:
    """Whether a setting of these types is the text, and not the value that YAML reads from it."""
    if any(get_origin(member) is Literal and text in get_args(member) for member in types):
        return True
    return str in types and type(value) not in types


def _is_composite(member: Any) -> bool:
    return get_origin(member) is not Literal and member not in (str, int, float, bool, NoneType)
