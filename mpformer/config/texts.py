"""Which settings are text: taken as it is written, where YAML would read a date, a number or a comment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

NAMES_OF_FILES = ("data.dataset",)
"""Settings that are sections, but may name a file that holds the section."""


def declared(schema: type[BaseModel], keys: Sequence[str]) -> list[Any]:
    """The types that a setting may have: of every member of the unions on the way; empty for no setting."""
    types: list[Any] = [schema]
    for key in keys:
        types = _inside(types, key)
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

    def resolved(value: Any, types: list[Any], key: str) -> Any:
        if isinstance(value, dict):
            return {k: resolved(v, _inside(types, k), f"{key}.{k}" if key else k) for k, v in value.items()}
        if isinstance(value, list):
            return [resolved(v, _inside(types, str(i)), f"{key}.{i}") for i, v in enumerate(value)]
        text = texts.get(key)
        return text if text and _is_text(text, value, types) and parse(text) == value else value

    return resolved(tree, [schema], "")


def _is_text(text: str, value: Any, types: Sequence[Any]) -> bool:
    """Whether a setting of these types is the text, and not the value that YAML reads from it."""
    if any(get_origin(member) is Literal and text in get_args(member) for member in types):
        return True
    return str in types and type(value) not in types


def _is_composite(member: Any) -> bool:
    return get_origin(member) is not Literal and member not in (str, int, float, bool, NoneType)


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, without what annotates them; of another type, itself."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _inside(types: Sequence[Any], key: str) -> list[Any]:
    """The types of what stands under a key, or at an index, of values of these types."""
    found: list[Any] = []
    for member in types:
        arguments = get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel):
            if (field := member.model_fields.get(key)) is not None:
                found += _members(field.annotation)
        elif get_origin(member) is dict:
            found += _members(arguments[1])
        elif get_origin(member) in (tuple, list) and key.isdecimal():
            same = get_origin(member) is list or Ellipsis in arguments
            if (index := 0 if same else int(key)) < len(arguments):
                found += _members(arguments[index])
    return found
