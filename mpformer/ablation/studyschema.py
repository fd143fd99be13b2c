"""The JSON Schema of a study file, for editors. Imports no torch."""

from __future__ import annotations

from mpformer.ablation.studyfile import StudyFile
from mpformer.config.schema import Json, for_editors, settings_schema

_SETTINGS: Json = {"$ref": "#/$defs/settings"}
_SEEDS: Json = {"type": "integer", "minimum": 1}


def study_schema() -> Json:
    """Of a study, its settings known by their dotted keys and as sections."""
    schema, settings = for_editors(StudyFile.model_json_schema()), settings_schema()
    definitions = schema["$defs"]
    for section in (schema, *(definitions[name] for name in ("Part", "Row", "Profile"))):
        section["properties"]["settings"] = _described(section, "settings", _SETTINGS)
    row, profile = definitions["Row"]["properties"], definitions["Profile"]["properties"]
    of_parts = {"type": "object", "additionalProperties": {"anyOf": [_SETTINGS, {"type": "null"}]}}
    row["parts"] = _described(definitions["Row"], "parts", of_parts)
    of_rows = {"type": "object", "additionalProperties": _SETTINGS}
    profile["rows"] = _described(definitions["Profile"], "rows", of_rows)
    for properties in (schema["properties"], profile):  # a list, or how many
        properties["seeds"] = {"anyOf": [properties["seeds"], _SEEDS]}
    definitions |= settings.pop("$defs") | {"settings": settings}
    return schema | {"title": "mpformer: a study"}


def _described(section: Json, name: str, schema: Json) -> Json:
    """The schema with the description of the setting that it is of."""
    description = section["properties"][name].get("description")
    return {"anyOf": [schema]} | ({"description": description} if description else {})
