"""What a data set is and how it has changed, from annotations and file names, without decoding images.

Annotation files and label maps are read whole and hashed, image files are known by their names. Nothing
depends on the place of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpformer.config import Data, DataSet
from mpformer.data import synthetic
from mpformer.data.catalog import check_root, open_split
from mpformer.data.packed import PackedRecords
from mpformer.data.records import Catalog, NamedRecords, Records, RecordTable
from mpformer.types import InputError

SPLITS = ("train", "val")
_READERS = 16
"""Files that are read at the same time: they may lie on a slow network."""
_NAMED = 3
"""Names of a kind that a message lists."""

Described = dict[str, Any]
"""One split, as JSON: `classes` ([name, source id, is_thing] of each), `images` (names; null for shards),
`count` (of images), `missing` (names of images that have gone since), `objects` (number of annotations; null
where they are in label maps), `annotations` and `labels` (digest of each annotation file, and of each label
map, mask or shard, by its path in the folder), `records` (digest of all records as they are read); `problem`,
where the annotation files have changed and cannot be read any more: why."""


class DataVersion:
    """The data set of some settings, read as far as is asked for, and each part once.

    Whatever reads the files raises `InputError` where they are missing or wrong.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self._splits: dict[str, Catalog] = {}
        self._annotations: dict[str, dict[str, str]] = {}
        self._described: dict[str, Described] = {}
        self._compared: dict[str, tuple[Described, Described]] = {}

    def open(self, split: str) -> Catalog:
        """`open_split`, but once."""
        if split not in self._splits:
            # before they are read: with what is changed meanwhile, their digest is not that of the records
            self._annotation_digests(split)
            self._splits[split] = open_split(self.data, split)
        return self._splits[split]

    def describe(self, split: str) -> Described:
        """The split as it is now."""
        if split not in self._described:
            catalog = self.open(split)
            classes = [[c.name, c.source_id, c.is_thing] for c in catalog.classes.classes]
            found = {"classes": classes, "annotations": self._annotation_digests(split)}
            self._described[split] = {**found, **_described_records(catalog)}
        return self._described[split]

    def compared(self, split: str, before: Described) -> Described:
        """The split as it is now; COCO's annotations are parsed only where their files have changed."""
        if split not in self._compared or self._compared[split][0] != before:
            check_root(self.data)
            self._compared[split] = before, self._now(split, before)
        return self._compared[split][1]

    def _now(self, split: str, before: Described) -> Described:
        # of an image that was missing then, no name is known that could be looked for
        all_there = before["count"] == len(before["images"] or ())
        if not isinstance(self.data.dataset, DataSet) or not all_there:
            return self.describe(split)
        if self._annotation_digests(split) != before["annotations"]:
            try:
                return self.describe(split)
            except InputError as error:
                if "" in self._annotation_digests(split).values():
                    raise
                return {**before, "annotations": self._annotation_digests(split), "problem": str(error)}
        root = str(self._root)
        return {
            **before,
            "missing": _missing(root, before["images"]),
            "labels": _digests(root, before["labels"]),
        }

    def tags(self, described: Mapping[str, Described]) -> dict[str, str]:
        """Tags of a run: `data` (what was read, in words), `data_version` (twelve hexadecimal digits), and
        `data_generator` (with what a generated set was made)."""
        digest = hashlib.sha256()
        for split, one in described.items():
            parts = [one[key] for key in ("classes", "images", "missing", "labels", "records")]
            digest.update(json.dumps([split, *parts]).encode())
        name = self.data.dataset.name
        tags = {
            "data": ", ".join(f"{name} {split}: {one['count']} images" for split, one in described.items())
        }
        if (made_with := synthetic.arguments_of(Path(self.data.place))) is not None:
            tags["data_generator"] = json.dumps(made_with, sort_keys=True)
            digest.update(tags["data_generator"].encode())
        return tags | {"data_version": digest.hexdigest()[:12]}

    @property
    def _root(self) -> Path:
        return Path(self.data.place).resolve()

    def _annotation_digests(self, split: str) -> dict[str, str]:
        if split not in self._annotations:
            files: list[str] = []
            if isinstance(self.data.dataset, DataSet):
                place = getattr(self.data.dataset, split)
                files = [place.annotations]
                if place.instances is not None and self.data.task == "panoptic":
                    files.append(place.instances)
            self._annotations[split] = _digests(str(self._root), files)
        return self._annotations[split]


def _described_records(catalog: Catalog) -> Described:
    root, records = catalog.root, _innermost(catalog.records)
    found: Described = {"images": None, "count": len(records), "missing": [], "objects": None}
    if isinstance(records, PackedRecords):
        return {**found, "labels": dict(zip(records.shards, records.checksums)), "records": ""}
    if isinstance(records, NamedRecords):
        files = (file for name in records.names for file in records.annotation_files(name))
        labels = _digests(root, sorted({os.path.relpath(file, root) for file in files}))
        return {**found, "images": list(records.names), "labels": labels, "records": ""}
    digests = [records.fingerprint()]
    if catalog.instances is not None:
        digests.append(catalog.instances.fingerprint())
    found |= {"labels": {}, "records": " ".join(digests)}
    if isinstance(records, RecordTable):
        found |= _table(root, records)
    return found


def _table(root: str, records: RecordTable) -> Described:
    images: list[str] = []
    labels: list[str] = []
    objects = 0
    for record in records:
        if isinstance(record.image, str) and record.image:
            images.append(record.image.removeprefix(f"{root}/"))
        if isinstance(record.label_map, str):
            labels.append(record.label_map.removeprefix(f"{root}/"))
        objects += len(record.segments)
    return {"images": images, "objects": objects, "labels": _digests(root, labels)}


def _innermost(records: Records) -> Records:
    """Those that others are made of, such as those with their stuff of those without."""
    while isinstance(inner := getattr(records, "records", None), Records):
        records = inner
    return records


def _missing(root: str, names: Iterable[str]) -> list[str]:
    """The names below `root` that no file has. One listing per folder instead of one look-up per file."""
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for name in names:
        folder, _, own = name.rpartition("/")
        if folder not in listed:
            path = os.path.join(root, folder)
            listed[folder] = frozenset(os.listdir(path)) if os.path.isdir(path) else frozenset()
        if own not in listed[folder]:
            missing.append(name)
    return missing


def _digests(root: str, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file by its path below `root`; empty where there is none."""
    names = list(names)
    with ThreadPoolExecutor(_READERS) as pool:  # reading and hashing release the GIL
        return dict(zip(names, pool.map(lambda name: _digest(os.path.join(root, name)), names)))


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


# --- changes in words -----------------------------------------------------------------------------


def changes(split: str, before: Described, now: Described) -> str:
    """What has changed in a split, in words, beginning with its annotation file; empty for nothing.

    Annotation files that are written anew with the same content have not changed.
    """
    parts = [
        *_class_changes(before["classes"], now["classes"]),
        *_name_changes("image", before["images"] or (), now["images"] or ()),
        *_named("image file is gone", "image files are gone", now["missing"]),
        *_file_changes(_noun(now), before["labels"], now["labels"]),
    ]
    if now["images"] is None and before["count"] != now["count"]:
        parts.append(f"{now['count']} images instead of {before['count']}")
    if before["objects"] != now["objects"]:
        parts.append(f"{now['objects']} annotations instead of {before['objects']}")
    if "problem" in now:
        parts = [f"changed, and cannot be read: {now['problem']}"]
    if not parts and before["records"] != now["records"]:
        kept = "" if now["objects"] is None else f" ({now['objects']}, as before)"
        parts.append(f"other annotations{kept}" if now["images"] == before["images"] else "another order")
    changed = [f for f, digest in now["annotations"].items() if before["annotations"].get(f) != digest]
    return f"{', '.join(changed) or split}: {', '.join(parts)}" if parts else ""


def _class_changes(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> list[str]:
    found = _name_changes("class", [c[0] for c in before], [c[0] for c in now])
    if not found and list(map(list, before)) != list(map(list, now)):
        return ["the classes have other ids, kinds or another order"]
    return found


def _noun(described: Described) -> str:
    return "shard" if described["images"] is None else "label file"


def _file_changes(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [name for name in before if now.get(name) and before[name] and now[name] != before[name]]
    there = [name for name in before if before[name]], [name for name in now if now[name]]
    return [
        *_named(f"{what} changed", f"{what}s changed", changed),
        *_name_changes(what, *there),
    ]


def _name_changes(what: str, before: Iterable[str], now: Iterable[str]) -> list[str]:
    before, now = list(before), list(now)
    several = what + ("es" if what.endswith("s") else "s")
    return [
        *_named(f"{what} added", f"{several} added", _beyond(now, before)),
        *_named(f"{what} removed", f"{several} removed", _beyond(before, now)),
    ]


def _beyond(names: Iterable[str], others: Iterable[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _named(one: str, several: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{len(names)} {one if len(names) == 1 else several} ({shown}{more})"]
