"""Reading recipes: a YAML file over its `base`, overridden, checked against the schema. Imports no torch.

A recipe is a YAML file whose keys mirror `Config`. It may name one other recipe as its `base`; its own
settings and then `key.sub=value` overrides are laid over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpformer.config.messages import explain
from mpformer.config.run import Config
from mpformer.config.shipped import DATA_SETS, locate
from mpformer.config.yamlfile import Source, read_settings
from mpformer.types import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a recipe with `key.sub=value` overrides laid over it.

    `path`: a file, or the name of a shipped one. Raises `InputError` naming file, line, key and the nearest
    right key.
    """
    source = read_recipe(path)
    return build_config(inline_dataset(source.overridden(overrides), Path()))


def read_recipe(path: str | Path) -> Source:
    """A recipe, a file or the name of a shipped one, laid over its `base`, data-set file inlined.

    Not yet checked against the schema.
    """
    source = read_settings(locate(path))
    path = source.path
    base = source.tree.pop("base", None)
    if base is not None:
        parent = read_settings(
            locate(source.text("base", base), path.parent).resolve(), named_by=f"{path}: base"
        )
        if "base" in parent.tree:
            raise InputError(
                f"{parent.path}: a base has no base of its own; lay {path.name} over {parent.tree['base']}"
            )
        if _dataset_file(source) is not None:
            _section(parent, "data").pop("dataset", None)  # nothing of the base's data set stays
        source = inline_dataset(parent, parent.path.parent).laid_under(inline_dataset(source, path.parent))
    else:
        source = inline_dataset(source, path.parent)
    source.tree.setdefault("name", path.stem)
    return source


def _section(source: Source, name: str) -> dict[str, Any]:
    found = source.tree.get(name)
    return found if isinstance(found, dict) else {}


def _dataset_file(source: Source) -> str | None:
    """The file that `data.dataset` names; None where it is a section, or nothing."""
    value = _section(source, "data").get("dataset")
    return None if value is None or isinstance(value, dict) else source.text("data.dataset", value)


def inline_dataset(source: Source, folder: Path) -> Source:
    """With the file that `data.dataset` names, if it names one, read in its place.

    It is relative to `folder`, or the name of a shipped one.
    """
    if (name := _dataset_file(source)) is None:
        return source
    dataset = read_dataset(
        locate(name, folder, DATA_SETS), named_by=f"{source.place(['data', 'dataset'])}: data.dataset"
    )
    tree = {**source.tree, "data": {**source.tree["data"], "dataset": dataset.tree}}
    places, texts = (
        {f"data.dataset.{key}": value for key, value in noted.items()}
        for noted in (dataset.places, dataset.texts)
    )
    return Source(source.path, tree, {**source.places, **places}, {**source.texts, **texts})


def read_dataset(path: Path, named_by: str = "") -> Source:
    """A data-set file; not yet checked against the schema."""
    source = read_settings(path.resolve(), named_by, DATA_SETS)
    source.tree.setdefault("name", path.stem)
    return source


def build_config(source: Source) -> Config:
    """Check a tree of settings against the schema; `InputError` names the place of the first error."""
    try:
        return Config.model_validate(source.as_written())
    except ValidationError as error:
        raise InputError(explain(error, source)) from None
