"""Opening a split of a data set: which reader, which classes, and what is wrong with single records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpformer import plugin
from mpformer.config import Data, DataSet, LabelMaps, MaskFiles, Packed, PluginDataSet, Split
from mpformer.config.section import Section
from mpformer.config.yamlfile import nearest_path
from mpformer.data import coco, labelmaps
from mpformer.data.findings import UNUSABLE, Finding, Notes, Weight
from mpformer.data.names import OTHER_NAMES, Files
from mpformer.data.packed import open_packed
from mpformer.data.records import Catalog, Reader, Record, Records, RecordTable, build_table
from mpformer.shell import command
from mpformer.types import ClassTable, InputError


def open_split(data: Data, split: str) -> Catalog:
    """Read and validate one split ("train" or "val") of the data set that the settings name.

    Raises `InputError` for a missing folder or file and for annotations of the wrong form. A record that is
    wrong by itself (a bad polygon, a missing image, ...) is an error, too, under `on_bad_sample: error`;
    under `skip` it stays in its place with its `problem` noted, so that the other samples keep their
    positions. What was taken otherwise than it is written stands in the catalog's findings.
    """
    check_root(data)
    catalog = _OPENERS[type(data.dataset)](data.dataset, data, split)
    if data.bits is not None:
        catalog = replace(catalog, records=_WithBits(catalog.records, data.bits))
    if data.task == "instance":
        classes, records = _things_only(catalog.classes, catalog.records)
        return replace(catalog, classes=classes, records=records)
    return catalog


def _open_packed(dataset: Packed, data: Data, split: str) -> Catalog:
    folder = dataset.train if split == "train" else dataset.val
    classes, records = open_packed(data.place, folder, data.task)
    return Catalog(_name(data, split), classes, records, data.place, records.group)


def _open_label_maps(dataset: LabelMaps, data: Data, split: str) -> Catalog:
    root = _root(data)
    classes, records, findings = labelmaps.read_label_maps(root, dataset, split, data.task)
    _stop_at_faults(data, findings)
    return Catalog(_name(data, split), classes, records, str(root), findings=findings)


def _open_mask_files(dataset: MaskFiles, data: Data, split: str) -> Catalog:
    root = _root(data)
    classes, records, findings = labelmaps.read_mask_files(root, dataset, split)
    return Catalog(_name(data, split), classes, records, str(root), findings=findings)


def _open_coco(dataset: DataSet, data: Data, split: str) -> Catalog:
    root, place = _root(data), dataset.train if split == "train" else dataset.val
    if not (root / place.annotations).is_file():
        raise InputError(
            f"no file {root / place.annotations}{nearest_path(root / place.annotations)}; "
            f"{command('data', 'check', Path(data.root))} finds the annotations in a folder of any layout"
        )
    read = coco.read_panoptic if dataset.format == "coco_panoptic" else coco.read_instance
    opened = read(root, dataset, place)
    instances = None
    if place.instances is not None and data.task == "panoptic":
        own = place.model_copy(update={"annotations": place.instances})
        image_ids = [record.image_id for record in opened.records]
        instances = _instances_of(root, dataset, own, opened.classes, image_ids)
    _stop_at_faults(data, opened.findings)
    records = _table(data, root, opened.records)
    name = _name(data, split)
    return Catalog(name, opened.classes, records, str(root), instances=instances, findings=opened.findings)


def _open_plugin(dataset: PluginDataSet, data: Data, split: str) -> Catalog:
    root = _root(data)
    place = f"data.dataset: {dataset.format}"
    read = plugin.build(dataset.format, dataset.options, Reader, "data.dataset.format")
    try:
        opened = read(root, split, data.task)
    except InputError:
        raise
    except Exception as error:  # the reader's own code
        raise InputError(f"{place}: {plugin.described(error)}") from error
    if not (isinstance(opened, tuple) and len(opened) == 2 and isinstance(opened[0], ClassTable)):
        raise InputError(f"{place}: a tuple (ClassTable, records) is expected, not {type(opened).__name__}")
    classes, records = opened
    findings: tuple[Finding, ...] = ()
    if not isinstance(records, Records):
        if not isinstance(records, Iterable):
            raise InputError(f"{place}: records are expected, not {type(records).__name__}")
        listed = list(records)
        seen: set[str] = set()
        for record in listed:
            if not isinstance(record, Record):
                raise InputError(f"{place}: a Record is expected for each image, not {record!r}")
            if record.image_id in seen:
                raise InputError(f"{place}: image {record.image_id} is there a second time")
            seen.add(record.image_id)
            if not isinstance(record.image, str) or not isinstance(record.label_map, str | None):
                raise InputError(
                    f"{place}: image {record.image_id}: paths are expected in listed records; pixels or "
                    "encoded files need a `Records` class"
                )
            labels = [s.label for s in record.segments]
            if wrong := [label for label in labels if label not in range(len(classes))]:
                raise InputError(
                    f"{place}: image {record.image_id}: label {wrong[0]} is none of {len(classes)} classes"
                )
        listed, findings = _located(root, listed)
        records = _table(data, root, listed)
    if not len(records):
        raise InputError(f"{place}: no image in the split '{split}' of {root}")
    return Catalog(_name(data, split), classes, records, str(root), findings=findings)


_OPENERS: dict[type[Section], Callable[[Any, Data, str], Catalog]] = {
    DataSet: _open_coco,
    LabelMaps: _open_label_maps,
    MaskFiles: _open_mask_files,
    Packed: _open_packed,
    PluginDataSet: _open_plugin,
}
"""How each section of `data.dataset` is opened."""


def _root(data: Data) -> Path:
    return Path(data.place).resolve()


def _name(data: Data, split: str) -> str:
    return f"{data.dataset.name} {split}"


def _table(data: Data, root: Path, listed: list[Record]) -> RecordTable:
    """The table of records whose paths are relative to `root`."""
    _stop_at_faults(data, (Finding(UNUSABLE, r.problem, Weight.FAULT) for r in listed if r.problem))
    return build_table(listed, str(root))


def _stop_at_faults(data: Data, findings: Iterable[Finding]) -> None:
    """Raise `InputError` with the first fault, unless faulty data are to be left out."""
    if data.on_bad_sample == "skip":
        return
    faults = [finding.text for finding in findings if finding.weight is Weight.FAULT]
    if len(faults) == 1:
        raise InputError(faults[0])
    if faults:
        raise InputError(f"{faults[0]} (and {len(faults) - 1} more faults: `mpformer data check` lists them)")


def check_root(data: Data) -> None:
    """Raise `InputError` unless `data.root` is a folder; not for a packed set, which may lie elsewhere."""
    root = Path(data.place)
    if not isinstance(data.dataset, Packed) and not root.is_dir():
        raise InputError(f"data.root: there is no folder {root}{nearest_path(root, folder=True)}")


def _instances_of(
    root: Path, dataset: DataSet, place: Split, classes: ClassTable, image_ids: Sequence[str]
) -> RecordTable:
    """The instance annotations of these images, their labels counted as in the panoptic class table."""
    path = root / place.annotations
    opened = coco.read_instance(
        root, dataset.model_copy(update={"format": "coco_instance", "stuff": None}), place
    )
    own, listed = opened.classes, opened.records
    label_of = classes.labels_by_source_id()
    for info in own.classes:
        if info.source_id not in label_of or not classes.classes[label_of[info.source_id]].is_thing:
            raise InputError(
                f"{path}: '{info.name}' (id {info.source_id}) is no thing of the panoptic classes"
            )
    labels = {i: label_of[info.source_id] for i, info in enumerate(own.classes)}
    found = {record.image_id: record for record in listed}
    if (missing := next((i for i in image_ids if i not in found), None)) is not None:
        raise InputError(f"{path}: no image {missing}, which the panoptic annotations have")
    if (problem := next((found[i].problem for i in image_ids if found[i].problem), None)) is not None:
        raise InputError(problem)
    return build_table((_relabelled(found[i], labels) for i in image_ids), str(root))


def _relabelled(record: Record, label_of: dict[int, int]) -> Record:
    """The record's segments whose labels are listed, with their new labels."""
    kept = (s for s in record.segments if s.label in label_of)
    return replace(record, segments=tuple(replace(s, label=label_of[s.label]) for s in kept))


def check_same_classes(expected: ClassTable, found: ClassTable, where: str) -> None:
    """Raise `InputError` unless number, order, names and ids of the classes agree; `where` names `found`."""
    for i, (a, b) in enumerate(zip(expected.classes, found.classes)):
        if a.name == b.name and a.source_id == b.source_id and a.is_thing != b.is_thing:
            raise InputError(
                f"{where}: class '{b.name}' is {'' if b.is_thing else 'not '}countable ('isthing'), unlike "
                "that of the other table: train and val, or checkpoint and data, need the same category table"
            )
        if (a.name, a.source_id) != (b.name, b.source_id):
            raise InputError(
                f"{where}: class {i} is '{b.name}' (id {b.source_id}), but '{a.name}' (id {a.source_id}) is "
                "expected: train and val, or checkpoint and data, need the same category table"
            )
    if len(expected) != len(found):
        raise InputError(f"{where}: {len(found)} classes, but {len(expected)} are expected")


def takes_classes_of(own: ClassTable, data: ClassTable) -> bool:
    """Whether a model whose file tells less of its classes than a data set has the classes of that data set.

    Files of other programs number their classes, or name them without the ids that they have in a data set:
    `own` is then `ClassTable.numbered`, or has the names of `data` in the same order and the ids 0, 1, ...
    """
    without_ids = [info.source_id for info in own.classes] == list(range(len(own)))
    numbered = own.names == ClassTable.numbered(len(own)).names
    return own != data and len(own) == len(data) and without_ids and (numbered or own.names == data.names)


@dataclass(frozen=True)
class _WithBits(Records):
    """Records whose 16-bit files use fewer bits: a setting, so the fingerprint does not have it."""

    records: Records
    bits: int

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        return replace(self.records[index], bits=self.bits)

    def fingerprint(self) -> str:
        return self.records.fingerprint()

    def objects_by_label(self) -> np.ndarray | None:
        return self.records.objects_by_label()


@dataclass(frozen=True)
class _Things(Records):
    """Records without their stuff, labels counted anew."""

    records: Records
    label_of: dict[int, int]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        return _relabelled(self.records[index], self.label_of)

    def fingerprint(self) -> str:
        return self.records.fingerprint()

    def objects_by_label(self) -> np.ndarray | None:
        every = self.records.objects_by_label()
        return None if every is None else every[[label for label in self.label_of if label < len(every)]]


def _things_only(classes: ClassTable, records: Records) -> tuple[ClassTable, Records]:
    things = sorted(classes.thing_labels)
    if len(things) == len(classes):
        return classes, records
    if not things:
        raise InputError(
            "data.task: 'instance' needs countable classes; this data set has none: try 'semantic'"
        )
    label_of = {old: new for new, old in enumerate(things)}
    return ClassTable(tuple(classes.classes[i] for i in things)), _Things(records, label_of)


def _located(root: Path, records: list[Record]) -> tuple[list[Record], tuple[Finding, ...]]:
    """A plug-in's records with the files that they mean; one that is not there is its record's problem."""
    files, notes = Files(root, ""), Notes(root)

    def located(record: Record) -> Record:
        paths = []
        for name in filter(None, (record.image, record.label_map)):
            try:
                path, other = files.find(name, f"{root}: image {record.image_id}")
            except InputError as error:
                return replace(record, problem=str(error))
            if other:
                notes.add(OTHER_NAMES, f"image {record.image_id}: '{name}' is taken to be {path}")
            paths.append(path)
        return replace(record, image=paths[0], label_map=paths[1] if len(paths) > 1 else None)

    return [record if record.problem else located(record) for record in records], notes.findings()
