"""What is wrong with settings, in one line: the place, the key, what is expected, the nearest right name.

pydantic says where and of which kind an error is; the words are made from the schema (`members.in_words`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mpformer.config.identity import flatten
from mpformer.config.members import at, in_words, members, tags
from mpformer.config.plugins import PLUGIN_TAG, Plugin
from mpformer.config.run import Config, SecretError
from mpformer.config.yamlfile import Source, masked, nearest

_LONGEST = 60
"""Characters of a value that are shown."""
_OWN = "value_error"
"""The type of the errors that the validators of this package raise, whose messages are written for users."""


def explain(error: ValidationError, source: Source) -> str:
    """The first error of a tree of settings."""
    # where a name or a section may stand, both are tried: an error in a section is reported as such
    errors = error.errors()
    first = next((e for e in errors if e["type"] != "literal_error" or not _is_tree(e)), errors[0])
    keys = written_keys(first, source.tree)
    named = [e for e in errors if e["type"] == "literal_error" and written_keys(e, source.tree) == keys]
    if named and _is_text(first) and first["type"] != _OWN:
        first = named[0]  # what is written is a name: the nearest of those that are expected
    if first["type"] == "union_tag_invalid":
        keys.append(first["ctx"]["discriminator"].strip("'()"))
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        known = [*flatten(Config().model_dump()), *_beside(first, Config, keys)]
        return f"{source.place(keys)}: no setting '{key}'; nearest: {nearest(key, known, sections=True)}"
    if first["type"] == "union_tag_invalid" or (first["type"] == "literal_error" and _is_text(first)):
        plugins = any(Plugin.__name__ in e["loc"] for e in errors)
        return f"{source.place(keys)}: {_choice(key, first, plugins)}"
    if isinstance(first.get("ctx", {}).get("error"), SecretError):
        return first["msg"].removeprefix("Value error, ")
    told = described(first, Config, keys)
    if first["type"] == _OWN:
        return f"{_place(source, keys, told)}: {key + ': ' if key else ''}{told}"
    written = keys[:-1] if first["type"] == "missing" else keys
    return f"{_where(source, written)}: {key}: {told}"


def described(error: ErrorDetails, schema: type[BaseModel], keys: Sequence[str]) -> str:
    """What is expected in the place of an error, and what was given there."""
    if error["type"] == "extra_forbidden":
        beside = (name.rpartition(".")[2] for name in _beside(error, schema, keys))
        return f"no such setting; nearest: {nearest(keys[-1], beside)}"
    given = error.get("input")
    shown = "" if isinstance(given, BaseModel | dict) else f" (given: {_short(given)})"
    if error["type"] == _OWN:
        return error["msg"].removeprefix("Value error, ") + shown
    expected = in_words(schema, keys) or "another value"
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"not given; expected {expected}"
    return f"expected {expected} (given: {_short(given)})"


def written_keys(error: ErrorDetails, tree: Any) -> list[str]:
    """The keys of an error as they stand in the file, without the tags of pydantic's unions.

    Only the last key may be absent from the file, and only if that is the error: a missing setting.
    """
    location, keys = error["loc"], []
    for i, part in enumerate(location):
        if isinstance(tree, Mapping):
            if part not in tree and not (error["type"] == "missing" and i + 1 == len(location)):
                continue
            tree = tree.get(part)
        elif isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            continue
        keys.append(str(part))
    return keys


def _beside(error: ErrorDetails, schema: type[BaseModel], keys: Sequence[str]) -> list[str]:
    """The dotted keys of all settings of the section that an unknown one stands in."""
    prefix = "".join(f"{key}." for key in keys[:-1])
    opened = (m.section for one in at(schema, keys[:-1]) for m in members(one.type, one.metadata))
    own = [s for s in opened if s is not None and (not tags(s) or set(tags(s)) & set(error["loc"]))]
    return [f"{prefix}{name}" for section in own for name in section.model_fields]


def _is_text(error: ErrorDetails) -> bool:
    return isinstance(error["input"], str)


def _is_tree(error: ErrorDetails) -> bool:
    return isinstance(error["input"], Mapping)


def _short(value: Any) -> str:
    text = repr(value) if value is not None else "null"
    text = str(value).lower() if isinstance(value, bool) else masked(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _where(source: Source, keys: Sequence[str]) -> str:
    """Where a setting, or a part of it, is given on the command line; else where it is written."""
    return " and ".join(source.given_below(keys).values()) or source.place(keys)


def _place(source: Source, keys: Sequence[str], told: str) -> str:
    """The place of an error of a section whose settings contradict each other.

    The settings of the command line that the message names: the file is right without them. Else the place of
    the setting that the message begins with.
    """
    given = source.given_below(keys)
    if chosen := [place for key, place in given.items() if _names(told, key)]:
        return " and ".join(chosen)
    begins = re.match(r"([a-z_]+(?:\.[a-z_]+)*):", told)
    return source.place([*keys, *(begins[1].split(".") if begins else [])])


def _names(told: str, key: str) -> bool:
    """Whether a message names a setting, by the end of its dotted key."""
    return any(re.search(rf"(?<![\w.]){re.escape(end)}(?![\w])", told) for end in _ends(key))


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _choice(key: str, error: ErrorDetails, plugins: bool) -> str:
    """A value that is none of the choices, with the nearest of them; `plugins`: a plug-in is one, too."""
    context = error["ctx"]
    given = context.get("tag", error["input"])
    expected = context.get("expected_tags") or context["expected"] + f", '{PLUGIN_TAG}'" * plugins
    names = re.findall(r"'([^']*)'", expected)
    return f"{key}: {masked(repr(given))} is none of {expected}; nearest: {nearest(str(given), names)}"
