"""Report on a data set: its contents and its faults, item by item."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpformer.config import Data, DataSet, Packed
from mpformer.cores import usable_cores
from mpformer.data.catalog import check_same_classes, open_split
from mpformer.data.images import load_ids, load_image, read_bytes
from mpformer.data.masks import BoxMask, Window, crop_masks
from mpformer.data.packed import verify
from mpformer.data.records import Catalog, MapId, Polygons, Record
from mpformer.types import InputError

SMALL, LARGE = 32**2, 96**2
"""COCO's limits between small, medium and large objects, in pixels."""
_UNUSABLE = "cannot be used"
_OTHER_TABLE = "category tables that differ"
_CHANGED_SHARD = "shards that have changed since they were written"
_LISTED = 10
"""Findings of a kind that the text lists."""


@dataclass(frozen=True)
class Finding:
    """One fault, or doubtful annotation."""

    kind: str
    text: str
    """File, id, fault."""


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


@dataclass(frozen=True)
class _Checked:
    """The check of one record."""

    usable: bool
    size: tuple[int, int]
    labels: tuple[int, ...] = ()
    areas: tuple[int, ...] = ()
    crowds: int = 0
    digest: bytes = b""
    findings: tuple[Finding, ...] = ()


def check(data: Data) -> dict[str, SplitReport]:
    """Read every image and mask of both splits; the reports by split.

    Raises `InputError` only where the annotations as a whole cannot be read.
    """
    damaged = {split: _verify(data, split) for split in ("train", "val")}
    lenient = data.model_copy(update={"on_bad_sample": "skip"})
    catalogs = {split: open_split(lenient, split) for split in ("train", "val")}
    seen: dict[bytes, str] = {}
    reports = {split: check_split(catalog, data, seen) for split, catalog in catalogs.items()}
    reports = {split: replace(r, findings=damaged[split] + r.findings) for split, r in reports.items()}
    try:
        check_same_classes(catalogs["train"].classes, catalogs["val"].classes, catalogs["val"].name)
    except InputError as error:
        found = (*reports["val"].findings, Finding(_OTHER_TABLE, str(error)))
        reports["val"] = replace(reports["val"], findings=found)
    return reports


def _verify(data: Data, split: str) -> tuple[Finding, ...]:
    """Shards of a packed split whose checksums are wrong."""
    if not isinstance(data.dataset, Packed):
        return ()
    lines = verify(data.root, getattr(data.dataset, split))
    return tuple(Finding(_CHANGED_SHARD, line) for line in lines)


def check_split(catalog: Catalog, data: Data, seen: dict[bytes, str] | None = None) -> SplitReport:
    """The report of one split. `seen` collects the digests of images, to find the same file in two splits."""
    seen = {} if seen is None else seen
    with ThreadPoolExecutor(usable_cores()) as pool:  # decoding and rasterising release the GIL
        checked = list(pool.map(lambda i: _check_record(catalog.records[i]), range(len(catalog))))
    findings: list[Finding] = []
    names: set[str] = set()
    for index, one in enumerate(checked):
        findings += one.findings
        record = catalog.records[index]
        where = record.image if isinstance(record.image, str) else f"image {record.image_id}"
        names.add(where)
        if one.digest:
            if one.digest in seen:
                findings.append(Finding("duplicate images", f"{where}: the same file as {seen[one.digest]}"))
            seen.setdefault(one.digest, f"{where} ({catalog.name})")
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
        unlisted=len(_images_beside(names) - names),
        findings=tuple(findings),
    )


def _check_record(record: Record) -> _Checked:
    if record.problem:
        return _Checked(False, (0, 0), findings=(Finding(_UNUSABLE, record.problem),))
    where = record.image if isinstance(record.image, str) else f"image {record.image_id}"
    try:
        digest = hashlib.blake2b(read_bytes(record.image), digest_size=16).digest()
        load_image(record)
        whole = Window.whole(record.width, record.height)
        found = list(crop_masks(record, record.segments, whole))
    except InputError as error:
        return _Checked(False, (0, 0), findings=(Finding(_UNUSABLE, str(error)),))
    kept = [(s, m) for s, m in zip(record.segments, found) if m is not None and not s.crowd]
    return _Checked(
        usable=True,
        size=(record.height, record.width),
        labels=tuple(s.label for s, _ in kept),
        areas=tuple(int(m.pixels.sum()) for _, m in kept),
        crowds=sum(s.crowd for s in record.segments),
        digest=digest,
        findings=tuple(_mask_findings(record, found, where)),
    )


def _mask_findings(record: Record, found: Sequence[BoxMask | None], where: str) -> Iterator[Finding]:
    twins: dict[tuple[object, ...], int] = {}
    size = np.array([record.width, record.height])
    for segment, mask in zip(record.segments, found):
        named = f"{where}: object {segment.id}"
        if mask is None:
            yield Finding("objects without a pixel in the image", named)
            continue
        if isinstance(segment.mask, Polygons):
            points = np.concatenate(segment.mask.parts)
            beyond = max((-points).max(), (points - size).max())
            if beyond > 1:
                yield Finding("polygons that reach outside the image", f"{named}: {beyond:.0f} pixels")
        pixels = int(mask.pixels.sum())
        if abs(segment.area - pixels) > max(30, 0.25 * pixels):
            stated = f"{segment.area:.0f} pixels stated, {pixels} drawn"
            yield Finding("areas that contradict the mask", f"{named}: {stated}")
        digest = hashlib.blake2b(np.packbits(mask.pixels).tobytes(), digest_size=16).digest()
        key = (segment.label, mask.x, mask.y, mask.pixels.shape, digest)
        if key in twins:
            yield Finding("duplicate objects", f"{named}: the same class and mask as {twins[key]}")
        twins.setdefault(key, segment.id)
    if any(isinstance(s.mask, MapId) for s in record.segments) and not isinstance(
        record.label_map, np.ndarray
    ):
        known = {0, *(s.id for s in record.segments)}
        for value in np.unique(load_ids(record)).tolist():
            if value not in known:
                source = record.label_map if isinstance(record.label_map, str) else "label map"
                yield Finding(
                    "ids that the annotations do not know",
                    f"{source}: id {value} (image {record.image_id})",
                )


def _images_beside(paths: set[str]) -> set[str]:
    """Files in the folders of these images that end like one of them."""
    suffixes = {Path(p).suffix.lower() for p in paths}
    folders = {Path(p).parent for p in paths}
    beside = set()
    for folder in folders:
        if folder.is_dir():
            beside |= {str(p) for p in folder.iterdir() if p.suffix.lower() in suffixes}
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
        f"  sizes {smallest_w} to {largest_w} wide, {smallest_h} to {largest_h} high",
        f"  objects per image {low} to {high}, median {middle}; {report.empty} images without any",
        f"  {small} small, {medium} medium, {large} large (below 32x32 pixels, below 96x96, above)",
    ]
    present = sorted((c for c in report.classes if c.objects), key=lambda c: -c.objects)
    shown = ", ".join(f"{c.name} {c.objects} in {c.images}" for c in present[:_LISTED])
    lines.append(f"  classes (objects in images): {shown}{_more(len(present) - _LISTED)}")
    missing = [c.name for c in report.classes if not c.objects]
    if missing:
        lines.append(
            f"  classes without an object: {', '.join(missing[:_LISTED])}{_more(len(missing) - _LISTED)}"
        )
    if report.unlisted:
        lines.append(f"  {report.unlisted} further image files are not annotated")
    by_kind: dict[str, list[str]] = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding.text)
    if not by_kind:
        lines.append("  no problems found")
    for kind, texts in by_kind.items():
        lines.append(f"  {kind}: {len(texts)}")
        lines += [f"    {text}" for text in texts[:_LISTED]]
        if len(texts) > _LISTED:
            lines.append(f"    and {len(texts) - _LISTED} more")
    return "\n".join(lines)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def obstacle(reports: Mapping[str, SplitReport], on_bad_sample: str) -> str | None:
    """Why training on such data would fail, in one line; None if it would not."""
    found = Counter(f.kind for report in reports.values() for f in report.findings)
    stops = [f"{kind}: {found[kind]}" for kind in (_OTHER_TABLE, _CHANGED_SHARD) if found[kind]]
    if found[_UNUSABLE] and on_bad_sample == "error":
        way_out = "mend them, or leave them out with data.on_bad_sample=skip"
        stops.append(f"{_UNUSABLE}: {found[_UNUSABLE]} ({way_out})")
    return "; ".join(stops) or None


def training_command(data: Data, recipe: str) -> str:
    """The command that trains on data found in a folder, with a recipe for COCO's usual layout."""
    settings = [f"data.root={data.root}"]
    if data.task != "instance":
        settings.append(f"data.task={data.task}")
    if isinstance(data.dataset, Packed):
        settings.append("data.dataset=packed")
    if isinstance(data.dataset, DataSet):
        usual = DataSet()
        if data.dataset.format != usual.format:
            settings.append(f"data.dataset.format={data.dataset.format}")
        for split in ("train", "val"):
            ours, theirs = getattr(data.dataset, split), getattr(usual, split)
            for key in ("images", "annotations", "panoptic_masks"):
                if getattr(ours, key) != getattr(theirs, key):
                    settings.append(f"data.dataset.{split}.{key}={getattr(ours, key)}")
    return " ".join(["mpformer train", recipe, *settings])
