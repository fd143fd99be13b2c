"""Pictures of an evaluation: each prediction beside its ground truth, the worst images first, on one page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpformer.data.images import load_image
from mpformer.data.masks import record_masks
from mpformer.data.records import Catalog, Record
from mpformer.draw import decode_png, encode_jpeg, overlay, side_by_side
from mpformer.evaluate.inference import to_result
from mpformer.evaluate.instance import ImageInstances, count_instances
from mpformer.evaluate.panoptic import Counts, count_segments
from mpformer.evaluate.prediction import Prediction, Scores
from mpformer.evaluate.semantic import confusion
from mpformer.evaluate.truth import true_instances, true_segments
from mpformer.types import ClassTable, Task


@dataclass(frozen=True)
class Judged:
    """How well one image was predicted."""

    prediction: Prediction
    record: Record
    quality: float | None
    """0..1; None where there is nothing to find and nothing was found."""
    verdict: str
    """The reason in words."""


def judge(prediction: Prediction, record: Record, classes: ClassTable, task: Task) -> Judged:
    """The quality of one image: PQ over all its segments or confident instances, or its mIoU (semantic)."""
    if task == "semantic":
        labels = decode_png(prediction.semantic)
        matrix = confusion(true_segments(record).semantic(), labels, len(classes))
        right, true = np.diagonal(matrix), matrix.sum(1)
        union = true + matrix[:, :-1].sum(0) - right
        seen = true > 0
        if not seen.any():
            return Judged(prediction, record, None, "nothing annotated")
        quality = float((right[seen] / union[seen]).mean())
        share = right.sum() / true.sum()
        return Judged(prediction, record, quality, f"mIoU {quality:.0%}, {share:.0%} of the pixels right")
    counts = _counts(prediction, record, classes, task)
    matched, spurious, missed = (int(n.sum()) for n in (counts.matched, counts.spurious, counts.missed))
    total = matched + 0.5 * (spurious + missed)
    verdict = f"{matched} of {matched + missed} found, {spurious} not there"
    if not total:
        return Judged(prediction, record, None, "nothing to find")
    return Judged(prediction, record, float(counts.iou.sum() / total), verdict)


def _counts(prediction: Prediction, record: Record, classes: ClassTable, task: Task) -> Counts:
    if task == "instance":
        things = [t for t in true_instances(record) if t.label in classes.thing_labels]
        image = ImageInstances(prediction.size, things, prediction.instances)
        return count_instances(image, len(classes))
    truth, found = true_segments(record), prediction.panoptic
    ids = decode_png(found.png)
    return count_segments(truth.ids, truth.labels, truth.crowd, ids, found.labels, len(classes))


def worst_first(predictions: Iterable[Prediction], catalog: Catalog, task: Task) -> list[Judged]:
    """All predicted images, the worst ones first; those without a quality last."""
    records = {record.image_id: record for record in catalog.records}
    judged = [judge(p, records[p.image_id], catalog.classes, task) for p in predictions if not p.problem]
    return sorted(judged, key=lambda j: (j.quality is None, j.quality or 0.0, j.record.image_id))


def picture(judged: Judged, classes: ClassTable, task: Task) -> np.ndarray:
    """Prediction and ground truth side by side, [h,w,3] uint8."""
    image = load_image(judged.record)
    found = to_result(judged.prediction, classes, task).overlay(image)
    if task == "semantic":
        labels = true_segments(judged.record).semantic()
        seen = [k for k in range(len(classes)) if (labels == k).any()]
        masks = [labels == k for k in seen]
    else:
        shown = classes.thing_labels if task == "instance" else range(len(classes))
        pairs = zip(record_masks(judged.record), judged.record.segments)
        kept = [(mask, segment.label) for mask, segment in pairs if segment.label in shown]
        masks, seen = [mask for mask, _ in kept], [label for _, label in kept]
    truth = overlay(image, masks, seen, classes)
    return side_by_side([found, truth], ["prediction", "ground truth"])


def write_page(
    folder: Path,
    title: str,
    predictions: Sequence[Prediction],
    catalog: Catalog,
    task: Task,
    scores: Scores,
    *,
    count: int = 24,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write FOLDER/evaluation.html and the pictures that it shows as FOLDER/NN-IMAGE.jpg; return all files.

    The page holds everything (style, pictures) and loads nothing. It shows the `count` worst images, then the
    figures, those of each class, and `facts` (images per second, ...).
    """
    folder.mkdir(parents=True, exist_ok=True)
    judged = worst_first(predictions, catalog, task)
    files, figures = [], []
    for rank, one in enumerate(judged[:count], 1):
        jpeg = encode_jpeg(picture(one, catalog.classes, task))
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in one.record.image_id)
        files.append(folder / f"{rank:02d}-{name[-80:]}.jpg")  # a file system allows 255 bytes
        files[-1].write_bytes(jpeg)
        quality = "no quality" if one.quality is None else f"quality {one.quality:.0%}"
        caption = f"<b>{html.escape(one.record.image_id)}</b> {quality}: {html.escape(one.verdict)}"
        data = base64.b64encode(jpeg).decode()
        figures.append(
            f'<figure><figcaption>{caption}</figcaption><img src="data:image/jpeg;base64,{data}" '
            f'alt="prediction beside ground truth"></figure>'
        )
    page = folder / "evaluation.html"
    page.write_text(_page(title, len(judged), figures, scores, facts or {}), encoding="utf-8")
    return [page, *files]


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
    tiles = {name: f"{value:.1f}" for name, value in scores.summary.items()} | dict(facts)
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in tiles.items()
    )
    columns = list(dict.fromkeys(name for row in scores.per_class.values() for name in row))
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{f'{row[c]:.1f}' if c in row else '–'}</td>" for c in columns)
        + "</tr>"
        for name, row in scores.per_class.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{images} images; figures in percent.</p>
<dl>{cells}</dl>
<h2>Worst images first</h2>
{"".join(figures) or "<p>No images.</p>"}
<h2>Classes</h2>
<div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</body></html>
"""
