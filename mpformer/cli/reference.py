"""The settings reference and the JSON Schemas: `mpformer show --help-settings`, `--json-schema`.

python -m mpformer.cli.reference     writes docs/settings.md and experiments/schemas/ of a checkout anew
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mpformer.ablation.studyschema import study_schema
from mpformer.config import schema
from mpformer.config.shipped import experiments
from mpformer.config.yamlfile import nearest
from mpformer.types import InputError

SCHEMAS: dict[str, Callable[[], schema.Json]] = {
    "recipe": schema.recipe_schema,
    "study": study_schema,
    "data-set": schema.data_set_schema,
}
"""By the kind of file."""


def settings_text(key: str) -> str:
    """The settings of a section, or of all with "", for a terminal. `InputError` where there is none."""
    return schema.as_text(schema.chosen(key))


def schema_text(kind: str) -> str:
    """The JSON Schema of a kind of file. `InputError` for a kind that is none."""
    if kind not in SCHEMAS:
        raise InputError(
            f"--json-schema {kind}: {', '.join(SCHEMAS)} expected; nearest: {nearest(kind, SCHEMAS)}"
        )
    head = {"$schema": "http://json-schema.org/draft-07/schema#"}  # that of the editors' YAML server
    return json.dumps(head | SCHEMAS[kind](), indent=1) + "\n"


def generated() -> dict[Path, str]:
    """The files of a checkout that are made from the schema: {path relative to it: content}."""
    files = {Path("docs", "settings.md"): schema.as_page(schema.settings())}
    return files | {Path("experiments", "schemas", f"{kind}.json"): schema_text(kind) for kind in SCHEMAS}


if __name__ == "__main__":
    for path, content in generated().items():
        target = experiments().parent / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(content, encoding="utf-8")
        print(target)
