"""The published models of `experiments/weights.yaml`, by name. Imports no torch, and fetches nothing."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass, field
from typing import Any

from mpformer.config import Config, Data, DataSet, LabelMaps, load_config
from mpformer.config.shipped import experiments
from mpformer.config.yamlfile import read_yaml
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

FILE = "weights.yaml"
_MD5_IN_NAME = re.compile(r"_([0-9a-f]{6})\.\w+$")


@dataclass(frozen=True)
class Release:
    """Who has published some models, and on which terms."""

    title: str
    licence: str
    page: str
    """Where the figures stand."""
    url: str = ""
    """What the names of its files are relative to; empty for repositories of a hub."""
    md5_in_name: bool = False
    """Whether the first digits of a file's MD5 stand at the end of its name."""


@dataclass(frozen=True)
class NamedWeights:
    """One published model. It has a `file` of its release, or a `repository` of the hub."""

    name: str
    release: Release
    recipe: str
    """The shipped recipe with the data, task and test size that it was trained for."""
    figures: dict[str, float]
    """{"AP": 43.7, ...}: as published, in percent."""
    file: str = ""
    repository: str = ""
    """OWNER/NAME"""
    revision: str = "main"
    """Commit, branch or tag of the repository."""
    sha256: str | None = None
    """None: not published."""
    settings: tuple[str, ...] = field(default=())
    """Where data and test size differ from the recipe's: `key.sub=value`."""

    @property
    def url(self) -> str:
        """Of the file."""
        return self.release.url + self.file

    @property
    def source(self) -> str:
        """Where it comes from, as `train.init` takes it: a URL, or `hf:OWNER/NAME[@REVISION]`."""
        if self.file:
            return self.url
        return f"hf:{self.repository}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def md5_start(self) -> str | None:
        """The first digits of the file's MD5, if its name tells them."""
        found = _MD5_IN_NAME.search(self.file) if self.release.md5_in_name else None
        return found[1] if found else None

    def config(self) -> Config:
        """The recipe's settings, of which data and evaluation are those of these weights."""
        return _config(self.recipe, self.settings)

    def classes(self) -> ClassTable:
        """The classes in the order of the class head."""
        return _classes_of(self.config().data)


@functools.cache
def named_weights() -> dict[str, NamedWeights]:
    """All of the catalogue, by name, in its order."""
    tree = _tree()
    releases = {name: Release(**values) for name, values in tree["releases"].items()}
    return {
        name: NamedWeights(
            **{
                **values,
                "name": name,
                "release": releases[values["release"]],
                "settings": tuple(values.get("settings", ())),
            }
        )
        for name, values in tree["weights"].items()
    }


def nearest_name(text: str) -> str | None:
    """The name that a misspelt one probably means; None where none is similar."""
    return next(iter(difflib.get_close_matches(text, named_weights(), n=1, cutoff=0.7)), None)


def figures_text(weights: NamedWeights) -> str:
    """Its published figures in a few words: "AP 43.7"."""
    return ", ".join(f"{metric} {value}" for metric, value in weights.figures.items())


@functools.cache
def _config(recipe: str, settings: tuple[str, ...]) -> Config:
    return load_config(recipe, settings)


@functools.cache
def _tree() -> dict[str, Any]:
    return read_yaml(experiments() / FILE).tree


def _classes_of(data: Data) -> ClassTable:
    """The classes of a data set that lists them, or of COCO; for instances those that are countable."""
    dataset = data.dataset
    if isinstance(dataset, LabelMaps):
        listed = [
            ClassInfo(entry.name, entry.id, entry.thing, entry.color or distinct_color(i))
            for i, entry in enumerate(dataset.classes)
        ]
    elif isinstance(dataset, DataSet):
        groups = _tree()["coco"]
        entries = [(True, *item) for item in groups["things"].items()]
        if dataset.format == "coco_panoptic":
            entries += [(False, *item) for item in groups["stuff"].items()]
        listed = [
            ClassInfo(name, id, thing, distinct_color(i)) for i, (thing, id, name) in enumerate(entries)
        ]
    else:
        raise InputError(f"{FILE}: the classes of a data set of the format {dataset.format} are not known")
    return ClassTable(tuple(info for info in listed if info.is_thing or data.task != "instance"))
