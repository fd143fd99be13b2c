"""The table of a study (Markdown and CSV) and its training-speed curves (PNG).

A cell is the mean over the seeds with its 95 % confidence interval (Student's t). A difference to the
baseline is taken seed by seed, on the seeds that both rows have: so what a seed does to both rows cancels.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from mpformer import draw
from mpformer.ablation.results import Results, collect, values_by_seed
from mpformer.ablation.spec import Study

CONFIDENCE = 0.95
MISSING = "–"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; `half_width` of its 95 % interval, None where n is 1."""

    mean: float
    half_width: float | None
    n: int


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % t interval of independent values; None without any."""
    array = np.asarray(list(values), dtype=np.float64)
    n = len(array)
    if n == 0:
        return None
    if n == 1:
        return Estimate(float(array[0]), None, 1)
    spread = array.std(ddof=1) / math.sqrt(n)
    return Estimate(float(array.mean()), float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread), n)


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """`ours` minus `baseline` on the seeds that both have; None where there is no such seed."""
    return estimate(ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys()))


@dataclass(frozen=True)
class Cell:
    """One row's value of one metric."""

    row: str
    metric: str
    ours: Estimate | None
    difference: Estimate | None
    """To the baseline, on the same seeds; None for the baseline itself."""
    paper: tuple[float, str] | None
    """The paper's figure and where it stands."""


def cells(study: Study, results: Results) -> list[Cell]:
    """First the untrained model, then the rows in the order of the file; each with all columns."""
    table = []
    for metric in study.file.columns:
        # rows may change the model, so "the" untrained model is the baseline's
        runs = results.get(study.file.baseline, {}).values()
        before = [value for run in runs if (value := run.untrained(metric)) is not None]
        table.append(Cell(UNTRAINED, metric, estimate(before), None, None))
    for row in study.rows:
        for metric in study.file.columns:
            ours = values_by_seed(results, row, metric)
            baseline = values_by_seed(results, study.file.baseline, metric)
            difference = None if row == study.file.baseline else paired_difference(ours, baseline)
            table.append(
                Cell(row, metric, estimate(ours.values()), difference, study.paper_figure(row, metric))
            )
    return table


# --- text -----------------------------------------------------------------------------------------


def markdown(study: Study, table: Sequence[Cell]) -> str:
    """The table as Markdown, columns aligned so that it reads well in a terminal, too."""
    with_paper = {cell.metric for cell in table if cell.paper}
    header = ["", "n"]
    for metric, column in study.file.columns.items():
        header += [column.title, "± to baseline"]
        header += ["paper", "− paper"] if metric in with_paper else []
    lines = []
    for row in [UNTRAINED, *study.rows]:
        own = {cell.metric: cell for cell in table if cell.row == row}
        counts = {cell.ours.n if cell.ours else 0 for cell in own.values()}
        line = [_row_title(study, row), "/".join(map(str, sorted(counts)))]
        for metric, column in study.file.columns.items():
            cell, digits = own[metric], column.digits
            line += [_value(cell.ours, digits), _signed(cell.difference, digits)]
            if metric in with_paper:
                line += [f"{cell.paper[0]:.{digits}f}" if cell.paper else MISSING, _to_paper(cell, digits)]
        lines.append(line)
    notes = ["Mean ± half width of the 95 % interval over n seeds; differences are taken on the same seeds."]
    if any(estimate and estimate.n == 1 for cell in table for estimate in (cell.ours, cell.difference)):
        notes.append("* one seed: no interval.")
    if any(cell.ours is None for cell in table):
        notes.append(f"{MISSING} not measured.")
    sources = sorted({cell.paper[1].split(", row")[0] for cell in table if cell.paper})
    notes += [f"Paper: {'; '.join(sources)}."] if sources else []
    return "\n".join([f"# {study.file.title}", "", *_aligned([header, *lines]), "", *notes]) + "\n"


def table_csv(study: Study, table: Sequence[Cell]) -> str:
    """The table as CSV, one line per cell, with full precision; an empty field is a missing number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["row", "title", "metric", "n", "mean", "ci95_half_width"]
    names += ["difference_n", "difference_mean", "difference_ci95_half_width"]
    writer.writerow([*names, "paper", "paper_source", "minus_paper"])
    for cell in table:
        ours, difference, paper = cell.ours, cell.difference, cell.paper
        writer.writerow(
            [
                cell.row,
                cell.row if cell.row == UNTRAINED else study.title(cell.row),
                cell.metric,
                *((ours.n, ours.mean, ours.half_width) if ours else (0, None, None)),
                *((difference.n, difference.mean, difference.half_width) if difference else (0, None, None)),
                *(paper or (None, None)),
                ours.mean - paper[0] if ours and paper else None,
            ]
        )
    return out.getvalue()


def _row_title(study: Study, row: str) -> str:
    if row == UNTRAINED:
        return "untrained model"
    return study.title(row) + (" (baseline)" if row == study.file.baseline else "")


def _value(value: Estimate | None, digits: int) -> str:
    if value is None:
        return MISSING
    if value.half_width is None:
        return f"{value.mean:.{digits}f} *"
    return f"{value.mean:.{digits}f} ± {value.half_width:.{digits}f}"


def _signed(value: Estimate | None, digits: int) -> str:
    return MISSING if value is None else ("+" if value.mean >= 0 else "") + _value(value, digits)


def _to_paper(cell: Cell, digits: int) -> str:
    return f"{cell.ours.mean - cell.paper[0]:+.{digits}f}" if cell.ours and cell.paper else MISSING


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "| "
        + " | ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))
        )
        + " |"
        for line in lines
    ]
    rule = (
        "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    )
    return [padded[0], rule, *padded[1:]]


# --- curves ---------------------------------------------------------------------------------------


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, Estimate]]:
    """The estimate over seeds at every x that any of the curves has."""
    by_x: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            if math.isfinite(y):
                by_x.setdefault(x, []).append(y)
    return [(x, estimate(values)) for x, values in sorted(by_x.items())]


def write_curves(study: Study, results: Results, folder: Path) -> list[Path]:
    """One PNG per column: the metric of every row against images (or steps), with 95 % bands over seeds."""
    written = []
    for metric, column in study.file.columns.items():
        lines = {
            study.title(row): mean_curve([run.curve(metric, study.file.x) for run in results[row].values()])
            for row in study.rows
        }
        series = {name: [(x, e.mean) for x, e in line] for name, line in lines.items()}
        bands = {
            name: [
                (x, e.mean - e.half_width, e.mean + e.half_width) for x, e in line if e.half_width is not None
            ]
            for name, line in lines.items()
        }
        path = folder / f"curve-{metric.removeprefix('val/').replace('/', '-')}.png"
        label = {"images": "training images seen", "steps": "optimiser steps"}[study.file.x]
        draw.curves(series, label, column.title, study.file.title, path, bands=bands)
        written.append(path)
    return written


def write_report(study: Study) -> tuple[str, list[Path]]:
    """Write table.md, table.csv and the curves into the study's folder; returns Markdown and files."""
    results = collect(study)
    table = cells(study, results)
    text = markdown(study, table)
    study.folder.mkdir(parents=True, exist_ok=True)
    files = {study.folder / "table.md": text, study.folder / "table.csv": table_csv(study, table)}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return text, [*files, *write_curves(study, results, study.folder)]
