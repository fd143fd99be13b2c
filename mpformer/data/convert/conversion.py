"""From a source folder to COCO: which reader, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mpformer import atomic
from mpformer.config.yamlfile import nearest, nearest_path
from mpformer.data.convert import labelme, supervisely, via, voc, yolo
from mpformer.data.convert.found import Found, Notes, Options
from mpformer.data.convert.recognise import PHRASES, Form, forms_at
from mpformer.data.convert.tree import Tree, read_json
from mpformer.data.convert.write import Written, write
from mpformer.types import InputError

_Reader: TypeAlias = Callable[[Tree, Options, Notes], Found]

_READERS: dict[Form, _Reader] = {
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "via": via.read,
    "supervisely": supervisely.read,
}

NAMES: dict[Form, str] = {
    "yolo": "YOLO segmentation",
    "voc": "Pascal VOC",
    "labelme": "LabelMe",
    "via": "VGG Image Annotator",
    "supervisely": "Supervisely",
}

REPORT = "conversion.txt"
"""In the output: what was written and everything that was noted. It marks the folder as ours."""

_SETTINGS: dict[str, tuple[str, ...]] = {
    "form": tuple(_READERS),
    "boxes": ("refuse", "rectangles"),
    "class": (),
}
"""The settings and their values; any value where none are listed."""

_OF_FORM: dict[str, tuple[Form, ...]] = {"boxes": ("yolo", "voc"), "class": ("via",)}
"""Settings that not every form knows."""

_WORDS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Conversion:
    """What came of it."""

    form: str
    classes: tuple[str, ...]
    splits: tuple[Written, ...]
    without_split: bool
    """Whether the source tells no split, so that all images are in train."""
    notes: Notes

    def lines(self, most: int | None = None) -> list[str]:
        """The report, with at most so many places of each note."""
        images = ", ".join(f"{each.images} {_WORDS[each.split]}" for each in self.splits)
        objects = sum(each.objects for each in self.splits)
        lines = [f"{self.form}: {images} images; {objects} objects"]
        lines.append(f"classes, ids from 1: {', '.join(self.classes)}")
        if self.without_split:
            lines.append("the source tells no split: all images are in instances_train.json")
        return [*lines, *self.notes.lines(most)]


def convert(source: Path, out: Path, settings: Sequence[str]) -> Conversion:
    """Convert a folder, or the file that describes one (data.yaml, a VIA project), into COCO in `out`.

    `settings`: `form=`, `boxes=`, `class=`. The source is only read; the same call again writes the same
    bytes. Raises `InputError` for what would make the result wrong, before anything is written; `OSError`.
    """
    chosen = _chosen(settings)
    if not source.exists():
        raise InputError(f"there is no {source}{nearest_path(source, folder=not source.suffix)}")
    root = (source.parent if source.is_file() else source).resolve()
    target = out.resolve()
    _check_target(target, root)
    form = _form(source, chosen.get("form"))
    for name in chosen:
        if form not in _OF_FORM.get(name, (form,)):
            known = " and ".join(NAMES[each] for each in _OF_FORM[name])
            raise InputError(f"setting '{name}={chosen[name]}': {NAMES[form]} has no such choice, {known} do")
    notes = Notes()
    tree = Tree(root, target, notes)
    if source.is_file() and form not in ("voc", "supervisely"):  # whose one file tells little
        tree.keep_labels(source.resolve())
    options = Options(rectangles=chosen.get("boxes") == "rectangles", attribute=chosen.get("class", ""))
    try:
        found = _READERS[form](tree, options, notes)
        if not found.pictures:
            raise InputError(f"no image with labels in it ({'; '.join(notes.places)})")
        _note_similar(found.classes, notes)
        written = write(found, target, NAMES[form], notes)
    except InputError as error:  # which names the file by its place in the source
        raise InputError(f"{source.parent if source.is_file() else source}: {error}") from None
    without_split = not any(picture.split for picture in found.pictures)
    done = Conversion(NAMES[form], found.classes, tuple(written), without_split, notes)
    report = "\n".join([f"source: {root}", *done.lines()]) + "\n"
    # file names may be no UTF-8
    atomic.write_text(target / REPORT, report.encode("utf-8", "backslashreplace").decode("utf-8"))
    return done


def _chosen(settings: Sequence[str]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in _SETTINGS:
            raise InputError(f"setting '{text}': no such setting here; nearest: {nearest(key, _SETTINGS)}")
        if _SETTINGS[key] and value not in _SETTINGS[key]:
            raise InputError(f"setting '{text}': {', '.join(_SETTINGS[key])} are the choices")
        if not value:
            raise InputError(f"setting '{text}': a value is expected")
        chosen[key] = value
    return chosen


def _form(source: Path, given: str | None) -> Form:
    if given is not None:
        return next(form for form in _READERS if form == given)
    forms = forms_at(source)
    if len(forms) == 1:
        return forms[0]
    if forms:
        phrases = " and ".join(PHRASES[form] for form in forms)
        raise InputError(f"{source}: {phrases}: say which, for instance form={forms[0]}")
    _refuse_broken(source)
    raise InputError(
        f"{source}: no YOLO (data.yaml), Pascal VOC (SegmentationObject, XML), LabelMe, VIA or Supervisely "
        "(meta.json) data found; COCO needs no conversion: mpformer data check"
    )


def _refuse_broken(source: Path) -> None:
    """Raise `InputError` for a file that cannot be read and so tells no form."""
    files = (
        [source]
        if source.is_file()
        else sorted(p for s in ("yaml", "yml", "json") for p in source.glob(f"*.{s}"))
    )
    for path in files:
        if path.suffix.lower() == ".json":
            read_json(path, str(path))
        elif path.suffix.lower() in (".yaml", ".yml"):
            yolo.read_description(path, str(path))


def _check_target(out: Path, root: Path) -> None:
    """Only an empty folder, or an earlier conversion of the same source, is written to."""
    if out == root or root.is_relative_to(out):
        raise InputError(f"{out}: the source lies in it; another folder is expected for the output")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: a folder for the output is expected, this is a file")
    names = {path.name for path in out.iterdir()} - {path.name for path in atomic.leftovers(out)}
    report = out / REPORT
    if names and not (
        names <= {REPORT, "annotations", "train", "val", "test"} and _is_of(report, root, names)
    ):
        raise InputError(f"{out}: not empty, and no conversion of {root}: an empty or new folder is expected")


def _is_of(report: Path, root: Path, names: set[str]) -> bool:
    if report.name not in names:
        return True  # an interrupted conversion, which writes its report last
    try:
        return report.read_text(encoding="utf-8").startswith(f"source: {root}\n")
    except (OSError, UnicodeDecodeError):
        return False


def _note_similar(classes: tuple[str, ...], notes: Notes) -> None:
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            notes.add("classes that differ in case or blanks alone, kept apart", ", ".join(map(repr, names)))
