"""The report of a study: its table (Markdown, CSV), training-speed curves (PNG) and one HTML page.

A cell is the mean over the seeds with its 95 % confidence interval. A difference to the baseline is taken
seed by seed, on the seeds that both rows have: so what a seed does to both rows cancels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpformer import draw
from mpformer.ablation.page import html_page
from mpformer.ablation.results import Results, RunResult, values_by_seed
from mpformer.ablation.spec import Study
from mpformer.ablation.statistics import (
    Estimate,
    Ordering,
    Reach,
    aligned_curve,
    estimate,
    mean_curve,
    ordering,
    paired_difference,
    reach,
)
from mpformer.ablation.studyfile import split_column
from mpformer.tracking.run_dir import ReportDir, StudyDir

MISSING = "–"
NO_SUCH = "–†"
UNTRAINED = "untrained"
AXES = {
    "images": "training images seen",
    "steps": "optimiser steps",
    "gpu_hours": "hours of all GPUs (of all workers, on CPUs)",
}
_WIDEST = 8
"""A table of more columns is turned on its side: metrics down, rows across."""


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
    without: int = 0
    """Runs that were evaluated to the end and have no such figure (AP of large objects, where the data have
    none)."""
    exists: bool = True
    """Whether the row has a model of the column's part (a per-pixel classifier has none for objects)."""

    @property
    def n(self) -> int:
        """Runs that the cell speaks of."""
        return self.ours.n if self.ours else self.without

    @property
    def no_such(self) -> bool:
        """No run can bring this figure, or those that have ended did not."""
        return not self.exists or (self.ours is None and self.without > 0)


def cells(study: Study, results: Results) -> list[Cell]:
    """First the untrained model, then the rows in the order of the file; each with all columns."""
    table = []
    for column in study.file.columns:
        # rows may change the model, so "the" untrained model is the baseline's
        part, metric = split_column(column)
        runs = results.get((study.file.baseline, part), {}).values()
        before = [value for run in runs if (value := run.untrained(metric)) is not None]
        without = sum(run.evaluated_untrained and run.untrained(metric) is None for run in runs)
        exists = part in study.file.parts_of(study.file.baseline)
        table.append(Cell(UNTRAINED, column, estimate(before), None, None, without, exists))
    for row in study.rows:
        for column in study.file.columns:
            ours = values_by_seed(results, row, column)
            baseline = values_by_seed(results, study.file.baseline, column)
            difference = None if row == study.file.baseline else paired_difference(ours, baseline)
            paper = study.paper_figure(row, column)
            part, metric = split_column(column)
            runs = results.get((row, part), {}).values()
            without = sum(bool(run.metrics) and metric not in run.metrics for run in runs)
            exists = part in study.file.parts_of(row)
            table.append(Cell(row, column, estimate(ours.values()), difference, paper, without, exists))
    return table


def orderings(study: Study, results: Results) -> dict[str, Ordering | None]:
    """By column: whether the rows stand to each other as in the paper."""
    found = {}
    for column in study.file.columns:
        paper = {row: figure[0] for row in study.rows if (figure := study.paper_figure(row, column))}
        if len(paper) > 1:
            found[column] = ordering({row: values_by_seed(results, row, column) for row in paper}, paper)
    return found


def reaches(study: Study, results: Results, column: str) -> dict[str, Reach | None]:
    """By row: images until a row is as good as the baseline at its end; finished runs only."""
    part, metric = split_column(column)

    def curves(row: str) -> dict[int, list[tuple[float, float]]]:
        runs = results.get((row, part), {}).items()
        return {seed: run.curve(metric, "images") for seed, run in runs if run.finished}

    return {row: reach(curves(row), curves(study.file.baseline)) for row in study.rows}


# --- text -----------------------------------------------------------------------------------------


def markdown(study: Study, table: Sequence[Cell], results: Results) -> str:
    """The tables as Markdown, columns aligned so that they read well in a terminal, too."""
    header, *lines = table_lines(study, table)
    finished = sum(run.finished for runs in results.values() for run in runs.values())
    seeds = f"seed{'s' if len(study.seeds) > 1 else ''} {', '.join(map(str, study.seeds))}"
    state = f"{study.name}, {seeds}: {finished} of {len(study.trials())} runs finished."
    text = [f"# {study.file.title}", "", state, "", *_aligned([header, *lines]), ""]
    notes = ["Mean ± half width of the 95 % interval over n seeds; differences are taken on the same seeds."]
    if any(estimate and estimate.n == 1 for cell in table for estimate in (cell.ours, cell.difference)):
        notes.append("* one seed: no interval.")
    if any(cell.n == 0 and cell.exists for cell in table):
        notes.append(f"{MISSING} not measured.")
    if any(cell.no_such for cell in table):
        notes.append(f"{NO_SUCH} not missing: there is no such figure of this model, or on these data.")
    sources = sorted({cell.paper[1].split(", row")[0] for cell in table if cell.paper})
    notes += [f"Paper: {'; '.join(sources)}."] if sources else []
    notes += [study.file.note] if study.file.note else []
    text += notes
    if sentences := ordering_sentences(study, results):
        text += ["", "## Order of the rows", "", *(f"- {sentence}" for sentence in sentences)]
    if len(speed := speed_lines(study, results)) > 1:
        text += ["", "## Training images until the baseline's final value", "", *_aligned(speed)]
    if len(layers := layer_lines(study, results)) > 1:
        text += ["", "## Consistency of the decoder's layers (MP-Former section 3)", "", *_aligned(layers)]
    return "\n".join(text) + "\n"


def table_lines(study: Study, table: Sequence[Cell]) -> list[list[str]]:
    """Header and lines of the table, as text."""
    with_paper = {cell.metric for cell in table if cell.paper}
    header = ["", "n"]
    for metric, column in study.file.columns.items():
        header += [column.title, "± to baseline"]
        header += ["paper", "− paper"] if metric in with_paper else []
    lines = [header]
    for row in [UNTRAINED, *study.rows]:
        own = {cell.metric: cell for cell in table if cell.row == row}
        counts = {cell.n for cell in own.values() if cell.exists}
        line = [row_title(study, row), "/".join(map(str, sorted(counts)))]
        for metric, column in study.file.columns.items():
            cell, digits = own[metric], column.digits
            shown = NO_SUCH if cell.no_such else value_text(cell.ours, digits)
            line += [shown, _signed(cell.difference, digits)]
            if metric in with_paper:
                line += [f"{cell.paper[0]:.{digits}f}" if cell.paper else MISSING, _to_paper(cell, digits)]
        lines.append(line)
    return [list(column) for column in zip(*lines)] if len(study.file.columns) > _WIDEST else lines


def ordering_sentences(study: Study, results: Results) -> list[str]:
    """One sentence per column that the paper has figures of."""
    sentences = []
    for column, found in orderings(study, results).items():
        title = study.file.columns[column].title
        if found is None:
            sentences.append(f"{title}: no two rows to compare yet.")
            continue
        verdict = "as in the paper" if found.reproduced else "not as in the paper"
        sentences.append(
            f"{title}: {verdict}: {found.as_in_paper} of {found.pairs} pairs of rows stand as there; "
            f"{found.resolved_as_in_paper} of these with an interval that leaves out zero, "
            f"{found.resolved_against} pairs stand the other way round with such an interval."
        )
    return sentences


def speed_lines(study: Study, results: Results) -> list[list[str]]:
    """Header and lines: images, and share of the baseline's images, for each `val/` column."""
    columns = [c for c in study.file.columns if split_column(c)[1].startswith("val/")]
    found = {column: reaches(study, results, column) for column in columns}
    header = [
        "",
        *(f"{study.file.columns[c].title}: {what}" for c in columns for what in ("images", "share")),
    ]
    lines = [header]
    for row in study.rows:
        if any(found[column][row] for column in columns):
            line = [row_title(study, row)]
            for column in columns:
                one = found[column][row]
                if one is None:
                    line += [MISSING, MISSING]
                elif one.amount is None:
                    line += [f"reached by {one.reached} of {one.n} seeds", MISSING]
                else:
                    line += [value_text(one.amount, 0), value_text(one.share, 2)]
            lines.append(line)
    return lines


def layer_lines(study: Study, results: Results) -> list[list[str]]:
    """Header and lines of Table 1's figures: mIoU-L and Util of every layer, in percent."""
    names = {"layer_iou": "mIoU-L", "query_utilization": "Util", "pilot_layer_iou": "pilots: mIoU-L"}
    names["pilot_query_utilization"] = "pilots: Util, matched"
    measured: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for (row, part), runs in results.items():
        for run in runs.values():
            for key, value in run.metrics.items():
                name, _, layer = key.removeprefix("diag/").rpartition("_")
                if key.startswith("diag/") and name in names:
                    measured.setdefault((row, part, name), {}).setdefault(int(layer), []).append(value)
    numbers = sorted({layer for layers in measured.values() for layer in layers})
    lines = [["", "", *(f"layer {n}" for n in numbers)]]
    for (row, part, name), layers in measured.items():
        title = row_title(study, row) + (f", {part}" if part else "")
        lines.append([title, names[name], *(value_text(estimate(layers.get(n, [])), 1) for n in numbers)])
    return lines


def table_csv(study: Study, table: Sequence[Cell]) -> str:
    """The table as CSV, one line per cell, with full precision; an empty field is a missing number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["row", "title", "metric", "n", "mean", "ci95_half_width"]
    names += ["difference_n", "difference_mean", "difference_ci95_half_width"]
    writer.writerow([*names, "paper", "paper_source", "minus_paper", "n_without_metric"])
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
                cell.without,
            ]
        )
    return out.getvalue()


def row_title(study: Study, row: str) -> str:
    """As the table heads it."""
    if row == UNTRAINED:
        return "untrained model"
    return study.title(row) + (" (baseline)" if row == study.file.baseline else "")


def value_text(value: Estimate | None, digits: int) -> str:
    """ "41.0 ± 0.7"; "41.0 *" for one seed; a dash for none."""
    if value is None:
        return MISSING
    mean = f"{round(value.mean, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before zero
    return f"{mean} *" if value.half_width is None else f"{mean} ± {value.half_width:.{digits}f}"


def _signed(value: Estimate | None, digits: int) -> str:
    return (
        MISSING
        if value is None
        else ("+" if round(value.mean, digits) >= 0 else "") + value_text(value, digits)
    )


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


def write_curves(study: Study, results: Results, folder: Path) -> list[Path]:
    """One PNG per column and axis (images, steps, hours), with 95 % bands over the seeds.

    `curve-AP.png` is drawn against the study's own axis, `curve-AP-steps.png` against another.
    """

    def runs_of(row: str, part: str) -> Collection[RunResult]:
        return results.get((row, part), {}).values()

    def band(line: Sequence[tuple[float, Estimate]]) -> list[tuple[float, float, float]]:
        return [
            (x, e.mean - e.half_width, e.mean + e.half_width) for x, e in line if e.half_width is not None
        ]

    written = []
    for column, heading in study.file.columns.items():
        part, metric = split_column(column)
        for x in AXES:
            join = aligned_curve if x == "gpu_hours" else mean_curve
            lines = {
                study.title(row): join(
                    [run.curve(metric, x) for run in results.get((row, part), {}).values()]
                )
                for row in study.rows
                if runs_of(row, part)
            }
            if x != study.file.x and not any(lines.values()):
                continue
            series = {name: [(at, e.mean) for at, e in line] for name, line in lines.items()}
            bands = {name: band(line) for name, line in lines.items()}
            stem = column.replace("val/", "").replace("/", "-").replace(":", "-")
            name = stem if x == study.file.x else f"{stem}-{x.replace('_', '-')}"
            path = ReportDir(folder).curve(name)
            draw.curves(series, AXES[x], heading.title, study.file.title, path, bands=bands)
            written.append(path)
    return written


def write_report(study: Study, results: Results) -> tuple[str, list[Path]]:
    """Write table.md, table.csv, the curves and report.html into the study's folder; Markdown and files."""
    table = cells(study, results)
    text = markdown(study, table, results)
    study.folder.mkdir(parents=True, exist_ok=True)
    place = StudyDir(study.folder)
    files = {place.table: text, place.table_csv: table_csv(study, table)}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    curves = write_curves(study, results, study.folder)
    place.page.write_text(html_page(study.file.title, text, curves), encoding="utf-8")
    return text, [*files, place.page, *curves]
