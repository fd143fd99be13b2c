"""Report on a data set: its contents and its faults, item by item."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpformer.config import Data, DataSet, Packed, load_config
from mpformer.data.catalog import check_same_classes, open_split
from mpformer.data.findings import Finding, Weight, in_short
from mpformer.data.inspection import Inspected
from mpformer.data.mirrored import mirrored
from mpformer.data.names import is_litter
from mpformer.data.obstacles import inspect_all, not_held_out, obstacles
from mpformer.data.packed import verify
from mpformer.data.records import Catalog
from mpformer.shell import command
from mpformer.types import InputError

SMALL, LARGE = 32**2, 96**2
"""COCO's limits between small, medium and large objects, in pixels."""
_OTHER_TABLE = "category tables that differ"
_CHANGED_SHARD = "shards that have changed since they were written"
_LISTED = 10
"""Findings of a kind that the text lists."""
_ORDER = list(Weight)
"""The weightiest last, told first."""


@dataclass(frozen=True)
class ClassCount:
    name: str
    objects: int
    images: int


@dataclass(frozen=True)
class SplitReport:
    """One split: its figures and its findings."""

    name: str
    images: int
    usable: int
    empty: int
    """Images without an object."""
    objects: int
    crowds: int
    classes: tuple[ClassCount, ...]
    sizes: tuple[int, int, int, int]
    """Smallest and largest width, smallest and largest height."""
    objects_per_image: tuple[int, int, int]
    """Fewest, median, most."""
    by_area: tuple[int, int, int]
    """Small, medium, large objects (COCO's limits)."""
    unlisted: int
    """Image files in the folders that no annotation names."""
    findings: tuple[Finding, ...]


def check(data: Data) -> dict[str, SplitReport]:
    """Read every image and mask of both splits; the reports by split.

    Raises `InputError` only where the annotations as a whole cannot be read.
    """
    damaged = {split: _verify(data, split) for split in ("train", "val")}
    lenient = data.model_copy(update={"on_bad_sample": "skip"})
    catalogs = {split: open_split(lenient, split) for split in ("train", "val")}
    seen: dict[bytes, str] = {}
    reports, names = {}, {}
    digests: dict[str, set[bytes]] = {}
    for split, catalog in catalogs.items():
        inspected = inspect_all(catalog.records[i] for i in range(len(catalog)))
        names[split] = {one.place for one in inspected if one.place}
        digests[split] = {one.digest for one in inspected if one.digest}
        report = _split_report(catalog, inspected, seen)
        found = (*damaged[split], *obstacles(catalog, data, split, inspected), *report.findings)
        reports[split] = replace(report, findings=found)
    if (shared := not_held_out(len(digests["train"] & digests["val"]), len(digests["val"]))) is not None:
        reports["val"] = replace(reports["val"], findings=(shared, *reports["val"].findings))
    exchanged = mirrored(catalogs["train"].classes.names, data)
    reports["train"] = replace(reports["train"], findings=(*reports["train"].findings, *exchanged))
    listed = names["train"] | names["val"]  # of one folder, an image may belong to the other split
    for split, report in reports.items():
        reports[split] = replace(report, unlisted=len(_images_beside(names[split]) - listed))
    try:
        check_same_classes(catalogs["train"].classes, catalogs["val"].classes, catalogs["val"].name)
    except InputError as error:
        found = (*reports["val"].findings, Finding(_OTHER_TABLE, str(error), Weight.OBSTACLE))
        reports["val"] = replace(reports["val"], findings=found)
    return reports


def _verify(data: Data, split: str) -> tuple[Finding, ...]:
    """Shards of a packed split whose checksums are wrong."""
    if not isinstance(data.dataset, Packed):
        return ()
    lines = verify(data.place, getattr(data.dataset, split))
    return tuple(Finding(_CHANGED_SHARD, line, Weight.OBSTACLE) for line in lines)


def _split_report(catalog: Catalog, checked: Sequence[Inspected], seen: dict[bytes, str]) -> SplitReport:
    """The report of one split, but for `unlisted`.

    `seen` collects the digests of images, to find the same file in two splits.
    """
    findings = list(catalog.findings)
    for one in checked:
        findings += one.findings
        if one.digest:
            if one.digest in seen:
                text = f"{one.place}: the same file as {seen[one.digest]}"
                findings.append(Finding("duplicate images", text))
            seen.setdefault(one.digest, f"{one.place} ({catalog.name})")
    usable = [one for one in checked if one.usable]
    areas = np.array([a for one in usable for a in one.areas], np.int64)
    widths, heights = [one.size[1] for one in usable] or [0], [one.size[0] for one in usable] or [0]
    per_image = sorted(len(one.labels) for one in usable) or [0]
    objects = Counter(label for one in usable for label in one.labels)
    images = Counter(label for one in usable for label in set(one.labels))
    return SplitReport(
        name=catalog.name,
        images=len(checked),
        usable=len(usable),
        empty=sum(not one.labels for one in usable),
        objects=len(areas),
        crowds=sum(one.crowds for one in usable),
        classes=tuple(ClassCount(n, objects[i], images[i]) for i, n in enumerate(catalog.classes.names)),
        sizes=(min(widths), max(widths), min(heights), max(heights)),
        objects_per_image=(per_image[0], per_image[len(per_image) // 2], per_image[-1]),
        by_area=(
            int((areas < SMALL).sum()),
            int(((areas >= SMALL) & (areas < LARGE)).sum()),
            int((areas >= LARGE).sum()),
        ),
        unlisted=0,
        findings=tuple(findings),
    )


def _images_beside(paths: set[str]) -> set[str]:
    """Files in the folders of these images that end like one of them."""
    suffixes = {Path(p).suffix.lower() for p in paths}
    folders = {Path(p).parent for p in paths}
    beside = set()
    for folder in folders:
        if folder.is_dir():
            beside |= {
                str(p) for p in folder.iterdir() if p.suffix.lower() in suffixes and not is_litter(p.name)
            }
    return beside


# --- as text --------------------------------------------------------------------------------------


def report_text(reports: dict[str, SplitReport]) -> str:
    """The reports as text for a terminal."""
    return "\n\n".join(_split_text(report) for report in reports.values())


def _split_text(report: SplitReport) -> str:
    low, middle, high = report.objects_per_image
    smallest_w, largest_w, smallest_h, largest_h = report.sizes
    small, medium, large = report.by_area
    lines = [
        f"{report.name}: {report.images} images, {report.objects} objects and {report.crowds} crowds "
        f"of {len(report.classes)} classes",
    ]
    if report.usable:
        lines += [
            f"  sizes {smallest_w} to {largest_w} wide, {smallest_h} to {largest_h} high",
            f"  objects per image {low} to {high}, median {middle}; {report.empty} images without any",
            f"  {small} small, {medium} medium, {large} large (below 32x32 pixels, below 96x96, above)",
        ]
    present = sorted((c for c in report.classes if c.objects), key=lambda c: -c.objects)
    if present:
        shown = ", ".join(f"{c.name} {c.objects} in {c.images}" for c in present[:_LISTED])
        lines.append(f"  classes (objects in images): {shown}{_more(len(present) - _LISTED)}")
    missing = [c.name for c in report.classes if not c.objects]
    if missing and present:
        lines.append(
            f"  classes without an object: {', '.join(missing[:_LISTED])}{_more(len(missing) - _LISTED)}"
        )
    if report.unlisted:
        lines.append(f"  {report.unlisted} further image files are not annotated")
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding)
    if not by_kind:
        lines.append("  no problems found")
    for kind, found in sorted(by_kind.items(), key=lambda item: -_ORDER.index(item[1][0].weight)):
        count, told = sum(f.count for f in found), min(len(found), _LISTED)
        lines.append(f"  {kind}: {count}")
        lines += [f"    {f.text}" for f in found[:told]]
        if count > told:
            lines.append(f"    and {count - told} more")
    return "\n".join(lines)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def obstacle(reports: Mapping[str, SplitReport], on_bad_sample: str) -> str | None:
    """Why training on such data would fail, in one line; None if it would not."""
    every = [f for report in reports.values() for f in report.findings]
    stops = in_short(f for f in every if f.weight is Weight.OBSTACLE)
    if on_bad_sample == "error" and all(report.usable for report in reports.values()):
        faults = Counter(f.kind for f in every if f.weight is Weight.FAULT)
        way_out = "mend them, or leave them out with data.on_bad_sample=skip"
        stops += [f"{kind}: {count} ({way_out})" for kind, count in faults.items()]
    return "; ".join(stops) or None


def training_command(
    data: Data, recipe: str, given: Sequence[str] = (), data_set_file: Path | None = None
) -> str:
    """The command that trains on data found in a folder, with a shipped recipe for COCO's usual layout.

    `given`: settings that were laid over what was found; `data_set_file`: what describes the data set, where
    its settings are too many for a command.
    """
    usual = load_config(recipe).data
    settings = [f"data.root={data.root}"]
    if data.task != usual.task:
        settings.append(f"data.task={data.task}")
    if isinstance(data.dataset, Packed):
        settings.append("data.dataset=packed")
    if isinstance(data.dataset, DataSet) and isinstance(usual.dataset, DataSet):
        if data.dataset.format != usual.dataset.format:
            settings.append(f"data.dataset.format={data.dataset.format}")
        for split in ("train", "val"):
            ours, theirs = getattr(data.dataset, split), getattr(usual.dataset, split)
            for key in ("images", "annotations", "panoptic_masks"):
                if getattr(ours, key) != getattr(theirs, key):
                    settings.append(f"data.dataset.{split}.{key}={getattr(ours, key)}")
            if ours.share != theirs.share:
                settings.append(f"data.dataset.{split}.share=[{ours.share[0]:g}, {ours.share[1]:g}]")
    if data_set_file is not None:
        settings.append(f"data.dataset={data_set_file}")
        given = [text for text in given if not text.startswith("data.dataset")]  # which is in the file
    known = {text.partition("=")[0] for text in settings}  # with the values that hold, however they are given
    settings += [text for text in given if text.partition("=")[0] not in known]
    return command("train", recipe, *settings)
