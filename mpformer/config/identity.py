"""Comparing settings: their difference, their YAML, and the identity of a run. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from mpformer.config.plugins import references
from mpformer.config.run import Config
from mpformer.plugin import is_library, source_hash


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train.lr': 1e-4, ...}: a nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def diff(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ: {dotted key: (value in a, value in b)}; None where absent."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    keys = [*left, *(k for k in right if k not in left)]
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def dump_yaml(config: Config) -> str:
    """The resolved settings as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dump_data_set(dataset: BaseModel) -> str:
    """A data set as the YAML of its file, without what is at its default."""
    chosen = dataset.model_dump(mode="json", exclude_defaults=True)
    named = dataset.model_dump(include={"name", "format"})
    return yaml.safe_dump(named | chosen, sort_keys=False, allow_unicode=True)


def identity_settings(config: Config) -> dict[str, Any]:
    """Settings of model, data and train that differ from their defaults and change what is computed; for a
    plug-in, a hash of its source, too. With `train.stop_early` those of evaluate, too, which then decide when
    training ends. Raises `InputError` where there is no such plug-in."""
    sections = ("model", "data", "train", *(("evaluate",) if config.train.stop_early else ()))
    neutral = set(_neutral_keys(Config))
    neutral.add("train.seed")  # a part of its own in the run's name
    changed = {key: value for key, (value, _) in diff(config, Config()).items() if _in(key, sections)}
    for key, reference in references(config):
        if _in(key, sections) and not is_library(reference):
            changed[f"{key}.source"] = source_hash(reference, key)
    return {key: value for key, value in sorted(changed.items()) if key not in neutral}


def _in(key: str, sections: Iterable[str]) -> bool:
    return key.split(".")[0] in sections


def _neutral_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _neutral_keys(field.annotation, f"{prefix}{name}.")


def config_hash(config: Config) -> str:
    """Eight hexadecimal digits that depend on `identity_settings` alone."""
    text = json.dumps(identity_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(config: Config) -> str:
    """The run's identity within its storage: recipe or row name, settings' hash, seed; no time stamp."""
    return f"{config.name}-{config_hash(config)}-s{config.train.seed}"
