"""A reader of YOLO segmentation folders: `images/`, `labels/` and a `data.yaml`.

    data.dataset: {name: my-set, format: yolo_reader:read}

`data.yaml` names the classes (`names`) and the image folder of each split (`train`, `val`) in `data.root`.
The labels of `images/train/a.jpg` are `labels/train/a.txt`: one object per line, its class and a polygon in
fractions of the image's width and height. An image without such a file has no objects.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from mpformer.config.yamlfile import nearest, read_yaml
from mpformer.data import masks
from mpformer.data.images import image_size
from mpformer.data.records import Polygons, Record, Segment, safe_relative_path
from mpformer.types import ClassInfo, ClassTable, InputError, distinct_color

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def read(root: Path, split: str, task: str, yaml: str = "data.yaml") -> tuple[ClassTable, list[Record]]:
    if task == "panoptic":
        raise InputError("data.task: YOLO labels hold objects only; expected: instance or semantic")
    path = root / yaml
    settings = read_yaml(path).tree
    for key in (split, "names"):
        if key not in settings:
            raise InputError(f"{path}: no '{key}'; nearest: '{nearest(key, map(str, settings))}'")
    names = settings["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        raise InputError(f"{path}: names: a list, or a mapping from 0, 1, 2, ... is expected")
    infos = (ClassInfo(str(names[i]), i, True, distinct_color(i)) for i in range(len(names)))
    classes = ClassTable(tuple(infos))

    folder = safe_relative_path(settings[split], f"{path}: {split}")
    if "images" not in PurePosixPath(folder).parts or not (root / folder).is_dir():
        raise InputError(f"{path}: {split}: a folder of {root} named images is expected, not '{folder}'")
    images = sorted(p for p in (root / folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    return classes, [_record(root, image.relative_to(root), classes) for image in images]


def _record(root: Path, image: Path, classes: ClassTable) -> Record:
    last = len(image.parts) - 1 - image.parts[::-1].index("images")
    labels = root.joinpath(*image.parts[:last], "labels", *image.parts[last + 1 :]).with_suffix(".txt")
    height = width = 0
    segments: list[Segment] = []
    problem = ""
    try:
        height, width = image_size(str(root / image))
        lines = labels.read_text().splitlines() if labels.exists() else []
        for number, line in enumerate(lines, 1):
            if line.strip():
                segments.append(_segment(line.split(), number, height, width, len(classes), str(labels)))
    except InputError as error:
        problem = str(error)
    return Record(str(image.with_suffix("")), str(image), width, height, tuple(segments), problem=problem)


def _segment(words: list[str], number: int, height: int, width: int, classes: int, file: str) -> Segment:
    where = f"{file}:{number}"
    try:
        label, values = int(words[0]), np.array(words[1:], np.float64)
    except ValueError:
        raise InputError(f"{where}: a class and numbers x y x y ... are expected") from None
    if not 0 <= label < classes:
        raise InputError(f"{where}: class {label}: 0 to {classes - 1} are expected")
    if len(values) == 4:
        raise InputError(f"{where}: a bounding box; the polygons of YOLO segmentation are expected")
    if len(values) < 6 or len(values) % 2:
        raise InputError(f"{where}: {len(values)} numbers: x and y of at least 3 points are expected")
    if not ((values >= -0.01) & (values <= 1.01)).all():
        raise InputError(f"{where}: coordinates are fractions of the image, 0 to 1")
    mask = Polygons((values.reshape(-1, 2) * (width, height),))
    return Segment(label, False, mask, masks.area(mask, height, width), number)
