"""The settings of a folder of data that has none: what is found in it.

Heavy parts are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpformer.cli.output import say
from mpformer.config import (
    Config,
    Data,
    DataSet,
    LabelMaps,
    Packed,
    build_config,
    inline_dataset,
    load_config,
)
from mpformer.config.yamlfile import Source
from mpformer.types import InputError


def is_data(place: str) -> bool:
    """Whether it is a folder or a bucket, not a recipe."""
    return Path(place).is_dir() or "://" in place


def config_at(place: str, settings: Sequence[str]) -> Config:
    """The settings of a recipe, or for a folder those of the data found in it and defaults otherwise."""
    if place.endswith(".json"):
        raise InputError(
            f"{place}: the folder that holds the data is expected, or a recipe, not a JSON of it"
        )
    if not is_data(place):
        return load_config(place, settings)
    found = {"root": root_setting(place), **detected(place, settings)}
    source = Source(Path(place), {"data": found}, {})
    return build_config(inline_dataset(source.overridden(settings), Path()))


def root_setting(place: str) -> str:
    """A folder as `data.root` has it: of a setting, ~ is the home folder."""
    return f"./{place}" if place.startswith("~") else place


def detected(place: str, settings: Sequence[str]) -> dict[str, Any]:
    """Task and data set as they are found in a folder, around those `settings` that choose parts of them.

    Nothing is looked for where they name a whole data set, or one of another form than COCO's.
    """
    data = Source(Path(place), {}, {}).overridden(settings).as_written().get("data")
    given = data.get("dataset", {}) if isinstance(data, dict) else {}
    if not isinstance(given, dict) or given.get("format") not in (None, "coco_instance", "coco_panoptic"):
        return {"task": "instance"}
    return _found_in(place, given)


def _found_in(place: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from mpformer.data.detect import detect

    found = detect(place, given)
    for note in found.notes:
        say(note)
    task = {"coco_panoptic": "panoptic", "label_maps": "semantic"}.get(found.dataset.format, "instance")
    return {"task": task, "dataset": found.dataset.model_dump()}


def data_set_for(place: str, data: Data) -> dict[str, Any] | None:
    """The data set in a folder, to be measured as another one was: None in the same layout, else as found.

    Of several forms of annotations those of the other's task are taken.
    """
    if _has_layout(place, data):
        return None
    given = {"format": "coco_panoptic"} if data.task == "panoptic" else {}
    found: dict[str, Any] = _found_in(place, given)["dataset"]
    return found


def _has_layout(place: str, data: Data) -> bool:
    """Whether a folder has the files of the validation split where those of `data` are."""
    from mpformer.data.packed import is_packed

    root, dataset = Path(place), data.dataset
    if isinstance(dataset, DataSet):
        return (root / dataset.val.annotations).is_file()
    if isinstance(dataset, LabelMaps):
        return (root / dataset.val.labels).is_dir()
    if isinstance(dataset, Packed):
        return is_packed(place)
    return True  # a pattern, or a plug-in's own: its reader says what is missing
