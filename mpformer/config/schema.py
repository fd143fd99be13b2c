"""The settings as a reference (key, default, values, meaning) and as JSON Schema, made from `Config` itself.

The meaning of a setting is the text below it in `mpformer/config`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mpformer.config.data import DataSet, LabelMaps, MaskFiles, Packed, PluginDataSet
from mpformer.config.members import Member, any_of, members, tag_key, tags, words
from mpformer.config.nearest import nearest
from mpformer.config.run import Config
from mpformer.plugin import REFERENCE
from mpformer.types import InputError

Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One setting, as the reference has it."""

    key: str
    """Dotted, such as `train.lr`; `*` stands for a number in a list."""
    default: str
    values: str
    """Such as "a number above 0"."""
    meaning: str
    kinds: tuple[str, ...] = ()
    """Of the section that it stands in, where there are several and not all of them have it."""


def settings(
    section: type[BaseModel] = Config, prefix: str = "", default: BaseModel | None = None
) -> list[Setting]:
    """Every setting below a section, in the order of the schema; of a union of sections all of them.

    default: the section that holds unless others are given.
    """
    return [one for name in section.model_fields for one in _of_field(section, name, prefix, default)]


def _of_field(section: type[BaseModel], name: str, prefix: str, whole: BaseModel | None) -> Iterator[Setting]:
    field, key = section.model_fields[name], f"{prefix}{name}"
    inner = _sections(Member(field.annotation, tuple(field.metadata)))
    # a plug-in beside names is one more of them, not a section to fill in
    kinds = {one: tags(one) for one in inner.sections if one.__name__ != "Plugin"}
    default = getattr(whole, name) if whole else field.get_default(call_default_factory=True)
    below = f"{key}.*." if inner.listed and not inner.one_too else f"{key}."
    if not kinds:
        yield Setting(key, _shown(default), words(field.annotation, field.metadata), field.description or "")
    elif len(inner.sections) == 1:
        if below != f"{key}." or default is None:
            yield Setting(
                key, _shown(default), words(field.annotation, field.metadata), field.description or ""
            )
        yield from settings(inner.sections[0], below, _if_of(inner.sections[0], default))
    else:
        yield _of_union(key, default, field.description or "", inner)
        yield from _merged(
            replace(one, kinds=tuple(kinds[member]))
            for member in kinds
            for one in settings(member, below, _if_of(member, default))
            if one.key != f"{below}{tag_key(member)}"
        )


def _if_of(section: type[BaseModel], default: Any) -> BaseModel | None:
    return default if isinstance(default, section) else None


def _of_union(key: str, default: Any, meaning: str, inner: _Sections) -> Setting:
    """The setting that says which of several sections it is."""
    tag = tag_key(inner.sections[0])
    first = default[0] if inner.listed and default else default
    about = "; ".join(f"{any_of(tags(one))}: {_first_sentence(one)}" for one in inner.sections)
    values = any_of(name for one in inner.sections for name in tags(one))
    named = f"{key}.{tag}"
    return Setting(named, _shown(getattr(first, tag or "", None)), values, f"{meaning} {about}".strip())


@dataclass(frozen=True)
class _Sections:
    """The sections that a setting may be, or be a list of."""

    sections: tuple[type[BaseModel], ...]
    listed: bool
    one_too: bool
    """Whether one section may stand in the place of the list."""


def _sections(member: Member) -> _Sections:
    found = list(members(member.type, member.metadata))
    direct = tuple(dict.fromkeys(one.section for one in found if one.section is not None))
    if direct or len(found) != 1:
        return _Sections(direct, False, False)
    listed = get_args(found[0].type) if get_origin(found[0].type) is tuple else ()
    inside = tuple(one.section for one in (members(listed[0]) if listed else ()) if one.section is not None)
    return _Sections(inside, bool(inside), len(inside) > 1)


def _merged(found: Iterable[Setting]) -> list[Setting]:
    """Settings that several kinds have alike, told once."""
    merged: dict[tuple[str, str, str, str], Setting] = {}
    for one in found:
        alike = (one.key, one.default, one.values, one.meaning)
        known = merged.get(alike)
        merged[alike] = one if known is None else replace(known, kinds=(*known.kinds, *one.kinds))
    return list(merged.values())


def _first_sentence(section: type[BaseModel]) -> str:
    text = " ".join((section.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")


def _shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is PydanticUndefined:
        return "none: to be given"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- as text --------------------------------------------------------------------------------------


def chosen(key: str) -> list[Setting]:
    """The settings of a section, or the one of that key; all for "". `InputError` where there is none."""
    every = settings()
    found = [one for one in every if not key or one.key == key or one.key.startswith(f"{key}.")]
    if not found:
        known = nearest(key, (one.key for one in every), sections=True)
        raise InputError(f"no setting '{key}'; nearest: {known}")
    return found


def as_text(found: Sequence[Setting]) -> str:
    """For a terminal."""
    return "\n\n".join(
        f"{one.key}={one.default}{_of_kinds(one)}\n    {one.values}\n    {' '.join(one.meaning.split())}"
        for one in found
    )


def as_page(found: Sequence[Setting]) -> str:
    """A page in Markdown, a table for each part of the schema."""
    lines = [
        "# Settings",
        "",
        "Every setting, as `key.sub=value` of a command or nested in a YAML file. This page is made from the",
        "schema (`python -m mpformer.cli.reference`); `mpformer show --help-settings` prints it, or with a",
        "key such as `train` a part of it. Of several kinds, those that have a setting stand behind it.",
        "",
        "An editor with a YAML server completes and checks settings by the JSON Schemas in",
        "`experiments/schemas/`, which `mpformer show --json-schema recipe`, `study` or `data-set` prints,",
        "too. The first line of a file names its schema:",
        "",
        "```",
        "# yaml-language-server: $schema=experiments/schemas/recipe.json",
        "```",
    ]
    parts: dict[str, list[Setting]] = {}
    for one in found:
        parts.setdefault(".".join(one.key.split(".")[:-1][:2]), []).append(one)
    for part, inside in parts.items():
        lines += [
            "",
            f"## {part or 'The run'}",
            "",
            "| setting | default | values | meaning |",
            "|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(map(_cell, _cells(one)))} |" for one in inside]
    return "\n".join(lines) + "\n"


def _cells(one: Setting) -> tuple[str, ...]:
    meaning = " ".join(one.meaning.split())
    return f"`{one.key}`{_of_kinds(one)}", f"`{one.default}`", one.values, meaning


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _of_kinds(one: Setting) -> str:
    return f" ({', '.join(one.kinds)})" if one.kinds else ""


# --- as JSON Schema -------------------------------------------------------------------------------


def recipe_schema() -> Json:
    """Of a recipe, and of a part of one that lies over its `base`: nothing is required."""
    schema = for_editors(Config.model_json_schema(), required=False)
    schema["title"] = "mpformer: a recipe"
    schema["properties"]["base"] = {"type": "string", "description": "The recipe that this one is laid over."}
    return schema


def data_set_schema() -> Json:
    """Of a data-set file."""
    kinds = (DataSet, LabelMaps, MaskFiles, Packed, PluginDataSet)
    schemas = [for_editors(kind.model_json_schema()) for kind in kinds]
    definitions = {name: one for schema in schemas for name, one in schema.pop("$defs", {}).items()}
    return {"title": "mpformer: a data set", "anyOf": schemas, "$defs": definitions}


def settings_schema() -> Json:
    """Of settings as studies have them: dotted or nested, each key of every section known."""
    recipe = recipe_schema()
    properties: Json = {}
    for key, schema in _dotted(recipe, recipe["$defs"], ""):
        known = properties.get(key)
        properties[key] = schema if known in (None, schema) else {"anyOf": [known, schema]}
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": recipe["$defs"],
    }


def _dotted(schema: Json, definitions: Json, prefix: str) -> Iterator[tuple[str, Json]]:
    if (reference := schema.get("$ref")) is not None:
        yield from _dotted(definitions[reference.rpartition("/")[2]], definitions, prefix)
    for one in schema.get("anyOf", ()):
        yield from _dotted(one, definitions, prefix)
    for name, one in schema.get("properties", {}).items():
        if prefix or name != "base":
            yield f"{prefix}{name}", one
            yield from _dotted(one, definitions, f"{prefix}{name}.")


def for_editors(schema: Json, required: bool = True) -> Json:
    """pydantic's JSON Schema, with what its validators accept besides: a plug-in as its name alone, a kind
    that is left out, one section in the place of a list of them, a file in the place of a data set.

    required: whether settings without a default have to be there.
    """
    done = _accepting(schema, required)
    for where, accepted in _ACCEPTED.items():
        owner, name = where
        if (section := done.get("$defs", {}).get(owner)) is not None:
            properties = section["properties"]
            described = properties[name].pop("description", None)
            properties[name] = {"anyOf": [properties[name], *accepted(properties[name])]}
            properties[name] |= {"description": described} if described else {}
    return done


_ACCEPTED: dict[tuple[str, str], Any] = {
    ("Pilot", "noise"): lambda schema: [schema["items"]],
    ("Data", "dataset"): lambda schema: [{"type": "string"}],
    ("Cluster", "gpu"): lambda schema: [{"type": "boolean"}],
}
"""Further forms of a setting, by (section, setting)."""


_RENAMED = {"oneOf": "anyOf", "prefixItems": "items"}
"""A kind that is left out fits several sections; and editors' YAML servers read draft 7 of JSON Schema."""


def _accepting(schema: Any, required: bool) -> Any:
    if isinstance(schema, list):
        return [_accepting(one, required) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("$ref") == "#/$defs/Plugin":
        return {"anyOf": [{"type": "string", "pattern": REFERENCE}, dict(schema)]}
    dropped = {"discriminator"} | (set() if required else {"required"})
    return {
        _RENAMED.get(key, key): _accepting(value, required)
        for key, value in schema.items()
        if key not in dropped
    }
