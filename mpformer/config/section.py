"""The base class and the number types of all settings. Imports neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Described:
    """In the annotation of a type: its values in words, for messages and the settings reference."""

    text: str


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def setting(default: Any, **bounds: Any) -> Any:
    """A setting that does not change what is computed, so it stays out of a run's identity."""
    return Field(default, json_schema_extra={"identity": False}, **bounds)
