"""An HTML page for an evaluation: metrics, and predictions beside the ground truth, worst images first."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpformer.data.pictures import reduced
from mpformer.data.records import Record
from mpformer.draw import attempted, decode_png, encode_jpeg, overlay, side_by_side
from mpformer.evaluate.evaluation import Evaluation
from mpformer.evaluate.inference import to_result
from mpformer.evaluate.instance import ImageInstances, count_instances
from mpformer.evaluate.panoptic import Counts, count_segments
from mpformer.evaluate.prediction import Prediction, Scores
from mpformer.evaluate.semantic import class_iou, confusion
from mpformer.evaluate.truth import true_instances, true_segments
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


def rate(prediction: Prediction, record: Record, classes: ClassTable) -> Rating:
    """The quality of one image: PQ of its segments or of its confident instances, or its mIoU (semantic).

    `ValueError` for the prediction of an unusable image.
    """
    if prediction.panoptic is not None:
        true, found = true_segments(record), prediction.panoptic
        counts = count_segments(true.ids, true.labels, true.crowd, found.ids(), found.labels, len(classes))
        return _rating(prediction, record, counts)
    if prediction.instances is not None:
        things = [t for t in true_instances(record) if t.label in classes.thing_labels]
        image = ImageInstances(prediction.size, things, prediction.instances)
        return _rating(prediction, record, count_instances(image, len(classes)))
    if prediction.semantic is None:
        raise ValueError(f"image {prediction.image_id} has no result: {prediction.problem}")
    labels = decode_png(prediction.semantic)
    matrix = confusion(true_segments(record).semantic(), labels, len(classes))
    if not matrix.any():
        return Rating(prediction, record, None, "no annotated pixels")
    quality = float(np.nanmean(class_iou(matrix)))
    correct = np.trace(matrix) / matrix.sum()
    return Rating(prediction, record, quality, f"mIoU {quality:.0%}, pixel accuracy {correct:.0%}")


def _rating(prediction: Prediction, record: Record, counts: Counts) -> Rating:
    numbers = (counts.true_positives, counts.false_positives, counts.false_negatives)
    matched, wrong, missed = (int(n.sum()) for n in numbers)
    total = matched + 0.5 * (wrong + missed)
    if not total:
        return Rating(prediction, record, None, "no objects")
    reason = f"{matched} of {matched + missed} found, {wrong} false positives"
    return Rating(prediction, record, float(counts.iou.sum() / total), reason)


def worst_first(evaluation: Evaluation) -> list[Rating]:
    """All predicted images, lowest quality first; those without a quality last."""
    catalog = evaluation.catalog
    records = {record.image_id: record for record in catalog.records}
    usable = [p for p in evaluation.predictions if not p.problem]
    rated = [rate(p, records[p.image_id], catalog.classes) for p in usable]
    return sorted(rated, key=lambda r: (r.quality is None, r.quality or 0.0, r.record.image_id))


def picture(prediction: Prediction, record: Record, classes: ClassTable) -> np.ndarray:
    """Prediction and ground truth side by side, [h,w,3] uint8 RGB. `ValueError` for an image too large."""
    if record.height * record.width > _LARGEST:
        raise ValueError(f"{record.width}x{record.height} pixels are too many for a picture")
    result = to_result(_confident(prediction), classes)
    image, masks = reduced(record, _LONGEST)
    labels = [segment.label for segment in record.segments]
    if result.task == "semantic":
        on_top = np.full(image.shape[:2], -1)
        for mask, label in zip(masks, labels):
            on_top[mask] = label
        labels = sorted(set(labels))
        masks = [on_top == label for label in labels]
    elif result.task == "instance":
        shown = [label in classes.thing_labels for label in labels]
        masks = [m for m, kept in zip(masks, shown) if kept]
        labels = [k for k, kept in zip(labels, shown) if kept]
    truth = overlay(image, masks, labels, classes)
    return side_by_side([result.overlay(image), truth], ["prediction", "ground truth"])


def _confident(prediction: Prediction) -> Prediction:
    """The prediction without the instances that no picture shows: their masks would fill the memory."""
    if prediction.instances is None:
        return prediction
    return replace(prediction, instances=tuple(one for one in prediction.instances if one.score >= SHOWN))


def write_page(
    folder: Path,
    title: str,
    evaluation: Evaluation,
    *,
    count: int = 24,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write FOLDER/evaluation.html and its pictures FOLDER/NN-IMAGE.jpg; return the paths of all files.

    The page is self-contained. It shows the metrics and `facts` (images per second, ...), the `count` worst
    images, and the metrics of each class. A picture that cannot be made is left out, with a warning.
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
    page = folder / "evaluation.html"
    page.write_text(_page(title, len(rated), figures, evaluation.scores, facts or {}), encoding="utf-8")
    return [page, *files]


def file_stem(image_id: str) -> str:
    """A file name without a suffix, of at most 200 bytes, from the end of an image's id."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in image_id)
    return name.encode()[-_NAME_BYTES:].decode(errors="ignore")


def _jpeg(one: Rating, classes: ClassTable) -> bytes | None:
    what = f"picture of image {one.record.image_id}"
    return attempted(lambda: encode_jpeg(picture(one.prediction, one.record, classes)), what)


def _text(text: str) -> str:
    return html.escape(printable(text))


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 1120px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
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


def _page(title: str, images: int, figures: Sequence[str], scores: Scores, facts: Mapping[str, str]) -> str:
    values = {name: f"{value:.1f}" for name, value in scores.summary.items()} | dict(facts)
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items()
    )
    columns = list(dict.fromkeys(name for row in scores.per_class.values() for name in row))
    head = "".join(f"<th>{_text(c)}</th>" for c in columns)
    rows = "".join(
        f"<tr><td>{_text(name)}</td>"
        + "".join(f"<td>{f'{row[c]:.1f}' if c in row else '–'}</td>" for c in columns)
        + "</tr>"
        for name, row in scores.per_class.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_text(title)}</title><style>{_STYLE}</style></head><body>
<h1>{_text(title)}</h1>
<p>{images} images; metrics in percent.</p>
<dl>{cells}</dl>
<h2>Worst images first</h2>
{"".join(figures) or "<p>No images.</p>"}
<h2>Classes</h2>
<div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</body></html>
"""
