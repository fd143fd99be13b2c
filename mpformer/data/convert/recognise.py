"""Which tool wrote a file or a folder, from a few of its files. Loads neither cv2 nor torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mpformer.config.yamlfile import read_yaml
from mpformer.data.names import is_litter
from mpformer.types import InputError

Form: TypeAlias = Literal["yolo", "voc", "labelme", "via", "supervisely"]

PHRASES: dict[Form, str] = {
    "yolo": "a YOLO data set",
    "voc": "a Pascal VOC data set",
    "labelme": "LabelMe annotations",
    "via": "a VIA project",
    "supervisely": "a Supervisely project",
}
"""Each form in words, for messages."""

VIA_CSV = "filename,file_size,file_attributes,region_count"
"""How VIA's CSV export begins, behind a '#' in older versions."""

_DEPTH = 4
_FILES = 50
"""How deep, and how many files of a kind, are looked at in a folder."""


def recognise(path: str | Path) -> str | None:
    """The tool whose data a file or folder is, in words ("a VIA project"); None for COCO and the unknown.

    Never raises for what the files hold; a file that cannot be read is not recognised.
    """
    forms = forms_at(Path(path))
    return PHRASES[forms[0]] if forms else None


def forms_at(path: Path) -> list[Form]:
    """Every form found at a path, the surest sign first: usually one or none."""
    if path.is_file():
        form = form_of_file(path)
        return [form] if form is not None else []
    found: dict[Form, None] = {}
    seen: dict[str, int] = {}
    for folder, folders, files in _walk(path):
        if "SegmentationObject" in folders or {"JPEGImages", "Annotations"} <= set(folders):
            found["voc"] = None
        if "labels" in folders and "classes.txt" in files:
            found["yolo"] = None
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix not in _FILE_KINDS or seen.get(suffix, 0) >= _FILES:
                continue
            seen[suffix] = seen.get(suffix, 0) + 1
            if (form := form_of_file(Path(folder, name))) is not None:
                found[form] = None
    return list(found)


def form_of_file(path: Path) -> Form | None:
    """The form that a single file belongs to, from its content."""
    look = _FILE_KINDS.get(path.suffix.lower())
    try:
        return look(path) if look is not None else None
    except (OSError, ValueError, RecursionError):
        return None


def form_of_json(content: Any) -> Form | None:
    """The form that a JSON file's content belongs to."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("shapes"), list) and ("imagePath" in content or "imageData" in content):
        return "labelme"
    if isinstance(content.get("_via_img_metadata"), dict):
        return "via"
    if content and all(isinstance(v, dict) and {"filename", "regions"} <= v.keys() for v in content.values()):
        return "via"
    classes = content.get("classes")
    if isinstance(classes, list) and any(
        isinstance(c, dict) and {"title", "shape"} <= c.keys() for c in classes
    ):
        return "supervisely"
    if isinstance(content.get("objects"), list) and isinstance(content.get("size"), dict):
        return "supervisely"
    return None


def _json(path: Path) -> Form | None:
    return form_of_json(json.loads(path.read_bytes()))


def _yaml(path: Path) -> Form | None:
    try:
        content = read_yaml(path).tree
    except (InputError, TypeError, AttributeError):  # the latter two for keys that are no text
        return None
    if not {"names", "nc"} & content.keys():
        return None
    return "yolo" if {"train", "val", "valid", "validation"} & content.keys() else None


def _csv(path: Path) -> Form | None:
    with path.open("rb") as file:
        head = file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip(b"#").replace(b'"', b"")
    return "via" if head.startswith(VIA_CSV.encode()) else None


def _xml(path: Path) -> Form | None:
    with path.open("rb") as file:
        head = file.read(2000)
    return "voc" if re.search(rb"<annotation[\s>]", head) else None


_FILE_KINDS: dict[str, Callable[[Path], Form | None]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".csv": _csv,
    ".xml": _xml,
}


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders from the top down, as `os.walk`, to a depth, in order, without litter."""
    for folder, folders, files in os.walk(root, followlinks=True):
        if len(Path(folder).relative_to(root).parts) >= _DEPTH - 1:
            deeper = []
        else:
            deeper = sorted(name for name in folders if not is_litter(name))
        yield folder, folders, sorted(name for name in files if not is_litter(name))
        folders[:] = deeper
