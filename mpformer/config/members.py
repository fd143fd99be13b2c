"""The types that a setting may have, on the way to it and in words. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from mpformer.config.plugins import PLUGIN_TAG
from mpformer.config.section import Described


@dataclass(frozen=True)
class Member:
    """A type, and what annotates it: bounds, `Described`."""

    type: Any
    metadata: tuple[Any, ...] = ()

    @property
    def section(self) -> type[BaseModel] | None:
        """The type where it is a section of settings."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None


def members(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Member]:
    """The members of a union, each with what annotates it; of another type, itself."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        yield from members(inner, (*own, *metadata))
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from members(member)
    else:
        yield Member(annotation, tuple(metadata))


def at(schema: type[BaseModel], keys: Iterable[str]) -> list[Member]:
    """What a setting may be, by all members of the unions on the way; empty for no setting.

    A union that the setting itself has is one member.
    """
    found = [Member(schema)]
    for key in keys:
        found = inside(found, key)
    return found


def inside(found: Iterable[Member], key: str) -> list[Member]:
    """What stands under a key, or at an index, of values of these types."""
    opened = (member for one in found for member in members(one.type, one.metadata))
    return [inner for member in opened for inner in _inside(member, key)]


def _inside(member: Member, key: str) -> Iterator[Member]:
    origin, arguments = get_origin(member.type), get_args(member.type)
    if member.section is not None:
        if (field := member.section.model_fields.get(key)) is not None:
            yield Member(field.annotation, tuple(field.metadata))
    elif origin is dict:
        yield Member(arguments[1])
    elif origin in (tuple, list) and key.isdecimal():
        same = origin is list or Ellipsis in arguments
        if (index := 0 if same else int(key)) < len(arguments):
            yield Member(arguments[index])


# --- in words -------------------------------------------------------------------------------------


def in_words(schema: type[BaseModel], keys: Iterable[str]) -> str:
    """The values that a setting may have, such as "a number above 0"; empty for no setting."""
    return any_of(words(one.type, one.metadata) for one in at(schema, keys))


def tag_key(section: type[BaseModel]) -> str | None:
    """The key that tells a section from the others of its union."""
    return next((key for key in ("kind", "format") if key in section.model_fields), None)


def tags(section: type[BaseModel]) -> list[str]:
    """What stands under that key: ["point"], or ["package.module:Name"] of a plug-in."""
    if (key := tag_key(section)) is None:
        return []
    field = section.model_fields[key]
    return _names(members(field.annotation, field.metadata))


def any_of(choices: Iterable[str]) -> str:
    """ "a, b or c"; what stands there twice is told once."""
    *first, last = dict.fromkeys(choices) or [""]
    return f"{', '.join(first)} or {last}" if first else last


def words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of a type, such as "a number above 0", "ray, torch or inline" or "a list, each text"."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return words(inner, (*own, *metadata))
    metadata = [item for one in metadata for item in (one, *getattr(one, "metadata", ()))]
    if (described := next((one.text for one in metadata if isinstance(one, Described)), None)) is not None:
        return described
    if get_origin(annotation) in (Union, UnionType):
        return _union(list(members(annotation)))
    return _one(Member(annotation, tuple(metadata)))


def _one(member: Member) -> str:
    origin, arguments = get_origin(member.type), get_args(member.type)
    if member.section is not None:
        return _sections([member.section])
    if origin is Literal:
        return any_of(_names([member]))
    if origin in (tuple, list):
        return _list(arguments, origin is list or Ellipsis in arguments, member.metadata)
    if origin is dict:
        return "lines `name: value`"
    if member.type in (int, float):
        return _number("a whole number" if member.type is int else "a number", member.metadata)
    return {bool: "true or false", str: "text", NoneType: "null"}.get(member.type, "any value")


def _names(found: Iterable[Member]) -> list[str]:
    """Choices one by one; other types in words."""
    names: list[str] = []
    for member in found:
        choices = get_args(member.type) if get_origin(member.type) is Literal else ()
        names += map(str, choices) if choices else [words(member.type, member.metadata)]
    return names


def _union(found: Sequence[Member]) -> str:
    sections = [one.section for one in found if one.section is not None]
    others = _names(one for one in found if one.section is None and one.type is not NoneType)
    null = ["null"] * any(one.type is NoneType for one in found)
    return any_of([*others, *([_sections(sections)] if sections else []), *null])


def _sections(sections: Sequence[type[BaseModel]]) -> str:
    names = [tag for section in sections for tag in tags(section)]
    if not names:
        return "a section of settings"
    return (
        PLUGIN_TAG
        if set(names) == {PLUGIN_TAG}
        else f"a section with {tag_key(sections[0])}: {any_of(names)}"
    )


def _list(arguments: Sequence[Any], same: bool, metadata: Sequence[Any]) -> str:
    if same:
        least = " of at least one" if any(getattr(one, "min_length", None) for one in metadata) else ""
        return f"a list{least}, each {words(arguments[0])}"
    each = [words(argument) for argument in arguments]
    if len(set(each)) == 1:
        return f"a list of {len(each)}, each {each[0]}"
    return f"a list: {', '.join(each)}"


def _number(kind: str, metadata: Sequence[Any]) -> str:
    bounds = {
        name: getattr(one, name, None)
        for one in metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(one, name, None) is not None
    }
    texts = {name: f"{value:g}" for name, value in bounds.items()}
    if "ge" in texts and ("le" in texts or "lt" in texts):
        return f"{kind} from {texts['ge']} to {texts.get('le') or 'below ' + texts['lt']}"
    signs = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    return " ".join([kind, ", ".join(f"{signs[name]} {text}" for name, text in texts.items())]).strip()
