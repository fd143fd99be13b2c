"""How settings name plug-ins (`mpformer.plugin`): `package.module:Name` in the place of a kind, with options.

A union of sections that `kind` tells apart takes plug-ins by a callable discriminator:

    Noise = Annotated[
        Annotated[PointNoise, Tag("point")] | ... | Annotated[Plugin, Tag(PLUGIN_TAG)], Discriminator(kind)
    ]

and a setting that is a plain name takes them as `Annotated[Literal["masked", ...] | Plugin, BY_NAME]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, StringConstraints

from mpformer.config.section import Described, Section
from mpformer.plugin import REFERENCE, is_reference

Options = dict[str, JsonValue]
"""Keyword arguments of a plug-in: plain values, since they are stored and hashed with the settings."""

PLUGIN_TAG = "package.module:Name"
"""The tag of plug-ins among the kinds of a union, as error messages list it."""

Reference = Annotated[str, StringConstraints(pattern=REFERENCE), Described(PLUGIN_TAG)]
"""`package.module:Name`."""


class Plugin(Section):
    """A kind from outside: see docs/extending.md."""

    kind: Reference
    """`package.module:Name`, importable where the command runs and on every worker."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the plug-in."""


def _tag(value: Any, key: str) -> Any:
    tag = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return PLUGIN_TAG if is_reference(tag) else tag


# Discriminators of unions: pydantic names them in its errors, and ours then name the setting.


def kind(value: Any) -> Any:
    """The tag of a member of a union that `kind` tells apart."""
    return _tag(value, "kind")


def format(value: Any) -> Any:
    """The tag of a member of a union that `format` tells apart."""
    return _tag(value, "format")


BY_NAME = BeforeValidator(lambda value: {"kind": value} if is_reference(value) else value)
"""Lets a plug-in without options be written as its name alone."""


def references(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The plug-ins that settings name: (dotted key of the section, reference)."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            inner = getattr(value, name)
            if name in ("kind", "format") and is_reference(inner):
                yield key, inner
            else:
                yield from references(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from references(inner, f"{key}.{index}")
