"""An HTML page for an evaluation: metrics, and predictions beside the ground truth, worst images first."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpformer.data.pictures import reduced
from mpformer.data.records import Record
from mpformer.draw import attempted, decode_png, encode_jpeg, overlay, side_by_side
from mpformer.evaluate.confusion import classes_csv, matrix_csv, matrix_html, total
from mpformer.evaluate.evaluation import Evaluation
from mpformer.evaluate.instance import ImageInstances, decode, match_instances
from mpformer.evaluate.panoptic import Matches, match_segments
from mpformer.evaluate.prediction import Prediction
from mpformer.evaluate.semantic import class_iou, confusion
from mpformer.evaluate.truth import true_instances, true_segments
from mpformer.tracking.run_dir import CLASSES_FILE
from mpformer.types import ClassTable, printable

SHOWN = 0.5
"""Score from which on an instance is drawn."""
_LONGEST = 4096
"""Pixels of the longer side of an image on a page."""
_LARGEST = 1 << 26
"""Pixels of an image from which on its page has no picture: each predicted mask has as many bytes."""
_NAME_BYTES = 200
"""Of the name of a picture's file; file systems allow 255."""


@dataclass(frozen=True)
class Rating:
    """The quality of the prediction of one image."""

    prediction: Prediction
    record: Record
    quality: float | None
    """0..1; None if there are neither true nor predicted objects."""
    reason: str
    """The counts behind the quality, in words."""
    outcomes: np.ndarray
    """[N,3] int64: (true class, found class, objects or pixels); the number of classes stands for none."""
    missed: frozenset[int] = frozenset()
    """Segments of the record that were not found."""
    false: frozenset[int] = frozenset()
    """Instances or segments of the prediction that are not there."""

    @property
    def semantic(self) -> bool:
        """Whether pixels are compared, not objects."""
        return self.prediction.panoptic is None and self.prediction.instances is None


def rate(prediction: Prediction, record: Record, classes: ClassTable) -> Rating:
    """The quality of one image: PQ of its segments or of its confident instances, or its mIoU (semantic).

    `ValueError` for the prediction of an unusable image.
    """
    if prediction.panoptic is not None:
        true, found = true_segments(record), prediction.panoptic
        matches = match_segments(true.ids, true.labels, true.crowd, found.ids(), found.labels)
        return _rating(prediction, record, matches, found.labels, len(classes))
    if prediction.instances is not None:
        every = true_instances(record)
        things = [i for i, one in enumerate(every) if one.label in classes.thing_labels]
        image = ImageInstances(prediction.size, [every[i] for i in things], prediction.instances)
        matches = match_instances(image, min_score=SHOWN).renumbered(things)
        return _rating(prediction, record, matches, [one.label for one in prediction.instances], len(classes))
    if prediction.semantic is None:
        raise ValueError(f"image {prediction.image_id} has no result: {prediction.problem}")
    labels = decode_png(prediction.semantic)
    matrix = confusion(true_segments(record).semantic(), labels, len(classes))
    pairs = np.argwhere(matrix)
    outcomes = np.column_stack([pairs, matrix[tuple(pairs.T)]]).astype(np.int64)
    if not matrix.any():
        return Rating(prediction, record, None, "no annotated pixels", outcomes)
    quality = float(np.nanmean(class_iou(matrix)))
    correct = np.trace(matrix) / matrix.sum()
    return Rating(prediction, record, quality, f"mIoU {quality:.0%}, pixel accuracy {correct:.0%}", outcomes)


def _rating(
    prediction: Prediction, record: Record, matches: Matches, labels: Sequence[int], classes: int
) -> Rating:
    true = np.array([segment.label for segment in record.segments], np.int64)
    found = np.asarray(labels, np.int64)
    outcomes = matches.outcomes(true, found, classes)
    matched, wrong, missed = len(matches.matched), len(matches.false), len(matches.missed)
    total = matched + 0.5 * (wrong + missed)
    if not total:
        return Rating(prediction, record, None, "no objects", outcomes)
    reason = f"{matched} of {matched + missed} found, {wrong} false positives"
    sides = (frozenset(side.tolist()) for side in (matches.missed, matches.false))
    return Rating(prediction, record, float(matches.iou.sum() / total), reason, outcomes, *sides)


def worst_first(evaluation: Evaluation) -> list[Rating]:
    """All predicted images, lowest quality first; those without a quality last."""
    catalog = evaluation.catalog
    records = {record.image_id: record for record in catalog.records}
    usable = [p for p in evaluation.predictions if not p.problem]
    rated = [rate(p, records[p.image_id], catalog.classes) for p in usable]
    return sorted(rated, key=lambda r: (r.quality is None, r.quality or 0.0, r.record.image_id))


def picture(rating: Rating, classes: ClassTable) -> np.ndarray:
    """Prediction and ground truth side by side, [h,w,3] uint8 RGB; what is false or missed is framed in red.

    `ValueError` for an image too large.
    """
    prediction, record = rating.prediction, rating.record
    if record.height * record.width > _LARGEST:
        raise ValueError(f"{record.width}x{record.height} pixels are too many for a picture")
    image, masks = reduced(record, _LONGEST)
    sides = [_found(prediction, rating.false, len(classes)), _true(rating, masks, classes)]
    titles = ["prediction", "ground truth"]
    if not rating.semantic:
        titles = ["prediction, false ones framed", "ground truth, missed ones framed"]
    drawn = [overlay(image, s.masks, s.labels, classes, s.scores, framed=s.framed) for s in sides]
    return side_by_side(drawn, titles)


@dataclass(frozen=True)
class _Side:
    """What is drawn on one of two pictures."""

    masks: Sequence[np.ndarray]
    labels: Sequence[int]
    scores: Sequence[float] | None
    framed: frozenset[int]
    """Places in these lists."""


def _found(prediction: Prediction, false: frozenset[int], classes: int) -> _Side:
    """Segments or instances, best score first; of these the confident ones: all would fill the memory."""
    if (panoptic := prediction.panoptic) is not None:
        ids, labels, scores = panoptic.ids(), panoptic.labels, panoptic.scores
        order = sorted(range(len(labels)), key=lambda i: -scores[i])
        masks = [ids == i + 1 for i in order]
    elif (instances := prediction.instances) is not None:
        labels, scores = tuple(one.label for one in instances), tuple(one.score for one in instances)
        order = [i for i, score in enumerate(scores) if score >= SHOWN]
        masks = [decode(instances[i].counts, prediction.size) for i in order]
    else:
        assert prediction.semantic is not None  # `rate` has refused it
        found = decode_png(prediction.semantic)
        present = [k for k in range(classes) if (found == k).any()]
        return _Side([found == k for k in present], present, None, frozenset())
    framed = frozenset(place for place, i in enumerate(order) if i in false)
    return _Side(masks, [labels[i] for i in order], [scores[i] for i in order], framed)


def _true(rating: Rating, masks: Sequence[np.ndarray], classes: ClassTable) -> _Side:
    """masks: of the segments of the record."""
    labels = [segment.label for segment in rating.record.segments]
    if rating.prediction.panoptic is not None:
        return _Side(masks, labels, None, rating.missed)
    if rating.prediction.instances is not None:
        kept = [i for i, label in enumerate(labels) if label in classes.thing_labels]
        framed = frozenset(place for place, i in enumerate(kept) if i in rating.missed)
        return _Side([masks[i] for i in kept], [labels[i] for i in kept], None, framed)
    on_top = np.full(masks[0].shape if masks else (1, 1), -1)
    for mask, label in zip(masks, labels):
        on_top[mask] = label
    present = sorted(set(labels))
    return _Side([on_top == label for label in present], present, None, frozenset())


def write_page(
    folder: Path,
    title: str,
    evaluation: Evaluation,
    *,
    averaged: Evaluation | None = None,
    count: int = 24,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write FOLDER/evaluation.html, its pictures FOLDER/NN-IMAGE.jpg, classes.csv and confusion.csv; return
    the paths of all files.

    The page is self-contained. It shows the metrics, the validation losses if they were computed, both of the
    averaged weights, too, if there are any, and `facts` (images per second, ...), the metrics of each class,
    which classes are taken for which, and the `count` worst images. A picture that cannot be made is
    left out, with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rated, classes = worst_first(evaluation), evaluation.catalog.classes
    files, figures = [], []
    for rank, one in enumerate(rated[:count], 1):
        jpeg = _jpeg(one, classes)
        if jpeg is None:
            continue
        files.append(folder / f"{rank:02d}-{file_stem(one.record.image_id)}.jpg")
        files[-1].write_bytes(jpeg)
        quality = "no quality" if one.quality is None else f"quality {one.quality:.0%}"
        caption = f"<b>{_text(one.record.image_id)}</b> {quality}: {html.escape(one.reason)}"
        data = base64.b64encode(jpeg).decode()
        figures.append(
            f'<figure><figcaption>{caption}</figcaption><img src="data:image/jpeg;base64,{data}" '
            f'alt="prediction beside ground truth"></figure>'
        )
    matrix = total((one.outcomes for one in rated), len(classes))
    tables = {
        folder / CLASSES_FILE: classes_csv(evaluation.scores, matrix, classes),
        folder / "confusion.csv": matrix_csv(matrix, classes),
    }
    for path, text in tables.items():
        path.write_text(text, encoding="utf-8")
    unit = "Pixels" if rated and rated[0].semantic else "Objects"
    confusion = matrix_html(matrix, classes, unit)
    page = folder / "evaluation.html"
    values = _values(evaluation) | (_values(averaged, " of the average") if averaged else {})
    note = f"{len(rated)} images; metrics in percent{', losses as in training' * bool(evaluation.losses)}."
    body = _body(note, values | dict(facts or {}), evaluation.scores.per_class, confusion, figures)
    page.write_text(_page(title, body), encoding="utf-8")
    return [page, *files, *tables]


def _values(evaluation: Evaluation, of: str = "") -> dict[str, str]:
    """Metrics and losses as text; of: what they are of, behind their names."""
    metrics = {f"{name}{of}": f"{value:.1f}" for name, value in evaluation.scores.summary.items()}
    return metrics | {f"{name}{of}": f"{value:.3f}" for name, value in evaluation.losses.items()}


def file_stem(image_id: str) -> str:
    """A file name without a suffix, of at most 200 bytes, from the end of an image's id."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in image_id)
    return name.encode()[-_NAME_BYTES:].decode(errors="ignore")


def _jpeg(one: Rating, classes: ClassTable) -> bytes | None:
    what = f"picture of image {one.record.image_id}"
    return attempted(lambda: encode_jpeg(picture(one, classes)), what)


def _text(text: str) -> str:
    return html.escape(printable(text))


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 1120px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
.confusion thead th {
  writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; vertical-align: bottom;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; margin: 0; }
dl div { border: 1px solid #8884; border-radius: .4rem; padding: .4rem .7rem; }
dt { opacity: .7; font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1.6rem; } img { width: 100%; border-radius: .3rem; }
figcaption { margin-bottom: .3rem; overflow-wrap: anywhere; }
"""


def _body(
    note: str,
    values: Mapping[str, str],
    per_class: Mapping[str, Mapping[str, float]],
    confusion: str,
    figures: Sequence[str],
) -> str:
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items()
    )
    columns = list(dict.fromkeys(name for row in per_class.values() for name in row))
    head = "".join(f"<th>{_text(c)}</th>" for c in columns)
    rows = "".join(
        f"<tr><td>{_text(name)}</td>"
        + "".join(f"<td>{f'{row[c]:.1f}' if c in row else '–'}</td>" for c in columns)
        + "</tr>"
        for name, row in per_class.items()
    )
    return f"""<p>{note}</p>
<dl>{cells}</dl>
<h2>Classes</h2>
<div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>
{confusion}
<h2>Worst images first</h2>
{"".join(figures) or "<p>No images.</p>"}"""


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_text(title)}</title><style>{_STYLE}</style></head><body>
<h1>{_text(title)}</h1>
{body}
</body></html>
"""
