"""`mpformer predict`: image files in, overlays and COCO files out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpformer.config import Config
from mpformer.data.names import without_litter
from mpformer.draw import decode_png, write_png
from mpformer.evaluate import instance as rle
from mpformer.evaluate.file_results import FileResult, ImageFile, predict_all
from mpformer.evaluate.prediction import FoundInstance, FoundSegments, Prediction
from mpformer.types import ClassTable, InputError, printable

if TYPE_CHECKING:
    from mpformer.model.architecture import Architecture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_images(
    paths: Sequence[str | Path], report: Callable[[str], None] | None = None
) -> list[tuple[Path, str]]:
    """Image files with the names of their results; folders are searched recursively.

    Files that macOS or Windows left are passed over, and `report` is told how many. A name is the path
    relative to the given folder, without the suffix unless two images differ only in it.
    Raises `InputError` for a path that does not exist, a folder without images, and two images of one name.
    """
    found: list[tuple[Path, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and _is_meant(p))
            inside, litter = without_litter(images, path)
            if litter and report:
                report(f"{path}: {litter} files that a system left are passed over")
            if not inside:
                raise InputError(f"{path}: no images in this folder (files ending in {', '.join(SUFFIXES)})")
            found += [(p, p.relative_to(path)) for p in sorted(inside)]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise InputError(f"{path}: no such file or folder")
    stems = [relative.with_suffix("") for _, relative in found]
    names: dict[str, Path] = {}
    for (path, relative), stem in zip(found, stems):
        name = str(stem if stems.count(stem) == 1 else relative)
        if name in names:
            raise InputError(
                f"{path}: its results would overwrite those of {names[name]}; predict them separately"
            )
        names[name] = path
    return [(path, name) for name, path in names.items()]


def _is_meant(path: Path) -> bool:
    """Whether a path is a file, or a link to one that is not there, which is not to be lost unnoticed."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def predict_files(
    model: Architecture,
    paths: Sequence[str | Path],
    out: str | Path,
    config: Config,
    *,
    predict: Callable[[Sequence[ImageFile]], Iterable[FileResult]] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Segment images of any size; write overlays and JSON into `out`; return the paths of the overlays.

    Writes NAME.png, an overlay (none of a huge image, with a warning); predictions.json, a COCO file with one
    run-length-encoded annotation per segment, its score and the source's category id; for panoptic results
    panoptic.json and panoptic/NAME.png (COCO's panoptic format); for semantic ones labels/NAME.png (source
    ids; 0 where general inference gives void). All hold the same segments, those that the thresholds of
    `config.evaluate` leave. `predict` computes the results of files, in their order (default: `predict_all`
    in this process). `report` is called with a line for each image, and for each file that cannot be read.
    Raises `InputError` for a path that does not exist, before anything is predicted, and for files that
    cannot be read, after the results of all others are written.
    """
    out = Path(out)
    files = [ImageFile(str(path), name) for path, name in find_images(paths, report)]
    writer = _CocoWriter(model.classes)
    pictures: list[Path] = []
    unread: list[str] = []
    results = predict(files) if predict else predict_all(model, files, config)
    try:
        for file, result in zip(files, results, strict=True):
            if result.prediction is None:
                unread.append(result.problem)
                line = f"left out: {printable(result.problem)}"
            else:
                segments = writer.add(result.prediction, file.path, out)
                line = f"{writer.images}/{len(files)} {file.path}: {segments} segments"
            if result.overlay is not None:
                pictures.append(out / f"{file.name}.png")
                pictures[-1].parent.mkdir(parents=True, exist_ok=True)
                pictures[-1].write_bytes(result.overlay)
            elif result.prediction is not None:
                line += ", no picture"
            if report:
                report(line)
    finally:
        if writer.images:
            writer.write(out)
    if unread:
        rest = f"; the results of the others are in {out}" if writer.images else ""
        raise InputError(
            f"{len(unread)} of {len(files)} files could not be read: the first: {unread[0]}{rest}"
        )
    return pictures


class _CocoWriter:
    """Collects results in COCO's formats."""

    def __init__(self, classes: ClassTable) -> None:
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._panoptic: list[dict[str, Any]] = []

    @property
    def images(self) -> int:
        return len(self._images)

    def add(self, prediction: Prediction, file_name: str, out: Path) -> int:
        """Add one image and write its PNG files; the number of its segments."""
        image_id = len(self._images) + 1
        height, width = prediction.size
        self._images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        found: Sequence[FoundInstance] = ()
        if prediction.panoptic is not None:
            found = self._add_panoptic(prediction, prediction.panoptic, out)
        elif prediction.instances is not None:
            found = prediction.instances
        elif prediction.semantic is not None:
            found = self._add_semantic(prediction, decode_png(prediction.semantic), out)
        for one in found:
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image_id,
                    "category_id": self._classes.classes[one.label].source_id,
                    "segmentation": {"size": [height, width], "counts": one.counts.decode()},
                    "area": rle.area(one.counts, prediction.size),
                    "bbox": rle.bounding_box(one.counts, prediction.size),
                    "iscrowd": 0,
                    "score": round(one.score, 6),
                }
            )
        return len(found)

    def _add_panoptic(
        self, prediction: Prediction, segments: FoundSegments, out: Path
    ) -> list[FoundInstance]:
        ids = segments.ids()
        coded = np.zeros((*ids.shape, 3), np.uint8)
        coded[..., 0], coded[..., 1] = ids & 255, ids >> 8
        name = f"panoptic/{prediction.image_id}.png"
        write_png(out / name, coded)
        found, infos = [], []
        for i, (label, score) in enumerate(zip(segments.labels, segments.scores), 1):
            counts = rle.encode_mask(ids == i)
            found.append(FoundInstance(label, score, counts))
            infos.append(
                {
                    "id": i,
                    "category_id": self._classes.classes[label].source_id,
                    "isthing": int(self._classes.classes[label].is_thing),
                    "area": rle.area(counts, prediction.size),
                    "bbox": rle.bounding_box(counts, prediction.size),
                    "iscrowd": 0,
                    "score": round(score, 6),
                }
            )
        self._panoptic.append({"image_id": len(self._images), "file_name": name, "segments_info": infos})
        return found

    def _add_semantic(self, prediction: Prediction, labels: np.ndarray, out: Path) -> list[FoundInstance]:
        source_ids = np.array([c.source_id for c in self._classes.classes])
        coded = np.zeros(labels.shape, np.uint8 if source_ids.max() <= 255 else np.uint16)
        seen = [int(k) for k in np.unique(labels) if k < len(source_ids)]
        for label in seen:
            coded[labels == label] = source_ids[label]
        write_png(out / "labels" / f"{prediction.image_id}.png", coded)
        return [FoundInstance(k, 1.0, rle.encode_mask(labels == k)) for k in seen]

    def write(self, out: Path) -> None:
        """Write the JSON files of all images added."""
        categories = [
            {"id": c.source_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
            for c in self._classes.classes
        ]
        files = {"predictions.json": self._annotations}
        if self._panoptic:
            files["panoptic.json"] = self._panoptic
        out.mkdir(parents=True, exist_ok=True)
        for name, entries in files.items():
            content = {"images": self._images, "categories": categories, "annotations": entries}
            (out / name).write_text(json.dumps(content), encoding="utf-8")
