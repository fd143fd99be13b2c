"""The report of a study: its table (Markdown, CSV), training-speed curves (PNG) and one HTML page.

A cell is the mean over the seeds with its 95 % confidence interval. A difference to the baseline is taken
seed by seed, on the seeds that both rows have, so that the effect of a seed on both rows cancels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpformer import draw
from mpformer.ablation.page import html_page
from mpformer.ablation.results import Results, RunResult, runs_of, values_by_seed
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
from mpformer.ablation.tables import MISSING, figure_text, markdown_table
from mpformer.tracking.run_dir import ReportDir, StudyDir
from mpformer.types import printable

NO_SUCH = "–†"
UNTRAINED = "untrained"
AXES = {
    "images": "training images seen",
    "steps": "optimiser steps",
    "gpu_hours": "hours of all GPUs (of all workers, on CPUs)",
}
_WIDEST = 8
"""A table of more columns is transposed: metrics down, rows across."""


@dataclass(frozen=True)
class Cell:
    """One row's value of one metric."""

    row: str
    metric: str
    ours: Estimate | None
    difference: Estimate | None
    """To the baseline, on the same seeds; None for the baseline itself."""
    paper: tuple[float, str] | None
    """The paper's figure and its table, row and column."""
    without: int = 0
    """Runs that were evaluated to the end and have no such figure (AP of large objects, where the data have
    none)."""
    exists: bool = True
    """Whether the row has a model of the column's part (a per-pixel classifier has none for objects)."""

    @property
    def n(self) -> int:
        """Number of runs behind the cell."""
        return self.ours.n if self.ours else self.without

    @property
    def no_such(self) -> bool:
        """No run can have this figure, or the finished ones do not."""
        return not self.exists or (self.ours is None and self.without > 0)


def cells(study: Study, results: Results) -> list[Cell]:
    """First the untrained model, then the rows in the order of the file; each with all columns."""
    table = []
    for column in study.file.columns:
        # rows may change the model, so "the" untrained model is the baseline's
        part, metric = split_column(column)
        runs = runs_of(results, study.file.baseline, column).values()
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
            runs = runs_of(results, row, column).values()
            exists = part in study.file.parts_of(row)
            # pilots are measured by `ablate`, after the training
            due = (
                exists and metric.startswith("diag/pilot_") and study.runs[row, part].model.pilot.queries > 0
            )
            without = sum(bool(run.metrics) and metric not in run.metrics and not due for run in runs)
            table.append(Cell(row, column, estimate(ours.values()), difference, paper, without, exists))
    return table


def orderings(study: Study, results: Results) -> dict[str, Ordering | None]:
    """By column: whether the rows are in the order of the paper."""
    found = {}
    for column in study.file.columns:
        paper = {row: figure[0] for row in study.rows if (figure := study.paper_figure(row, column))}
        if len(paper) > 1:
            found[column] = ordering({row: values_by_seed(results, row, column) for row in paper}, paper)
    return found


def reaches(study: Study, results: Results, column: str) -> dict[str, Reach | None]:
    """By row: images until a row is as good as the baseline at its end; finished runs only."""
    _, metric = split_column(column)

    def curves(row: str) -> dict[int, list[tuple[float, float]]]:
        runs = runs_of(results, row, column).items()
        return {seed: run.curve(metric, "images") for seed, run in runs if run.finished}

    return {row: reach(curves(row), curves(study.file.baseline)) for row in study.rows}


# --- text -----------------------------------------------------------------------------------------


def markdown(study: Study, table: Sequence[Cell], results: Results) -> str:
    """The tables as Markdown, columns aligned so that they read well in a terminal, too."""
    finished = sum(run.finished for runs in results.values() for run in runs.values())
    seeds = f"seed{'s' if len(study.seeds) > 1 else ''} {', '.join(map(str, study.seeds))}"
    state = f"{study.name}, {seeds}: {finished} of {len(study.trials())} runs finished."
    text = [f"# {printable(study.file.title)}", "", state, "", *markdown_table(table_lines(study, table)), ""]
    text += _notes(study, table)
    if sentences := ordering_sentences(study, results):
        text += ["", "## Order of the rows", "", *(f"- {sentence}" for sentence in sentences)]
    if len(speed := speed_lines(study, results)) > 1:
        text += ["", "## Training images until the baseline's final value", "", *markdown_table(speed)]
    if len(layers := layer_lines(study, results)) > 1:
        text += [
            "",
            "## Consistency of the decoder's layers (MP-Former section 3)",
            "",
            *markdown_table(layers),
        ]
    return "\n".join(text) + "\n"


def _notes(study: Study, table: Sequence[Cell]) -> list[str]:
    """What the signs of the table mean, and where the paper's figures stand."""
    notes = ["Mean ± half width of the 95 % interval over n seeds; differences are taken on the same seeds."]
    if any(estimate and estimate.n == 1 for cell in table for estimate in (cell.ours, cell.difference)):
        notes.append("* one seed: no interval.")
    if any(cell.n == 0 and cell.exists for cell in table):
        notes.append(f"{MISSING} not measured.")
    if any(cell.no_such for cell in table):
        notes.append(f"{NO_SUCH} not applicable: no such figure of this model, or on these data.")
    if sources := sorted({cell.paper[1].split(", row")[0] for cell in table if cell.paper}):
        notes.append(f"Paper: {'; '.join(sources)}.")
    if (chosen := study.file.note_on_figures) is not None:
        notes.append(chosen)
    if study.file.note:
        notes.append(study.file.note)
    return notes


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
                line += _paper_texts(cell, digits)
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
            f"{title}: {verdict}: {found.as_in_paper} of {found.pairs} pairs of rows are in the paper's "
            f"order, {found.resolved_as_in_paper} of these with an interval that excludes zero; "
            f"{found.resolved_against} pairs are in the opposite order with such an interval."
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
    mean = figure_text(value.mean, digits)
    return f"{mean} *" if value.half_width is None else f"{mean} ± {value.half_width:.{digits}f}"


def _signed(value: Estimate | None, digits: int) -> str:
    sign = "+" if value is not None and round(value.mean, digits) >= 0 else ""
    return sign + value_text(value, digits)


def _paper_texts(cell: Cell, digits: int) -> list[str]:
    """The paper's figure, and ours minus it."""
    if cell.paper is None:
        return [MISSING, MISSING]
    figure, _ = cell.paper
    return [f"{figure:.{digits}f}", f"{cell.ours.mean - figure:+.{digits}f}" if cell.ours else MISSING]


# --- curves ---------------------------------------------------------------------------------------


def write_curves(study: Study, results: Results, folder: Path) -> list[Path]:
    """One PNG per column and axis (images, steps, hours), with 95 % bands over the seeds.

    `curve-AP.png` is drawn against the study's own axis, `curve-AP-steps.png` against another.
    """
    written = []
    for column, heading in study.file.columns.items():
        for x, label in AXES.items():
            lines = {
                study.title(row): _joined(runs_of(results, row, column).values(), column, x)
                for row in study.rows
                if runs_of(results, row, column)
            }
            if x != study.file.x and not any(lines.values()):
                continue
            series = {name: [(at, value.mean) for at, value in line] for name, line in lines.items()}
            bands = {name: _band(line) for name, line in lines.items()}
            stem = column.replace("val/", "").replace("/", "-").replace(":", "-")
            path = ReportDir(folder).curve(stem if x == study.file.x else f"{stem}-{x.replace('_', '-')}")
            title = study.file.title
            # hours differ from run to run: such a mean is interpolated between what was measured
            measured = None if x != "gpu_hours" else _measured(study, results, column, x)
            drawing = partial(
                draw.curves, series, label, heading.title, title, path, bands=bands, measured=measured
            )
            if draw.attempted(drawing, str(path)):
                written.append(path)
    return written


def _measured(study: Study, results: Results, column: str, x: str) -> dict[str, list[tuple[float, float]]]:
    """By title of a row: the points of its runs."""
    metric = split_column(column)[1]
    return {
        study.title(row): [
            point for run in runs_of(results, row, column).values() for point in run.curve(metric, x)
        ]
        for row in study.rows
    }


def _joined(runs: Iterable[RunResult], column: str, x: str) -> list[tuple[float, Estimate]]:
    """The mean curve of some runs against an axis of `AXES`."""
    curves = [run.curve(split_column(column)[1], x) for run in runs]
    return aligned_curve(curves) if x == "gpu_hours" else mean_curve(curves)


def _band(line: Sequence[tuple[float, Estimate]]) -> list[tuple[float, float, float]]:
    """(x, low, high) of the 95 % intervals, where there are any."""
    return [(x, e.mean - e.half_width, e.mean + e.half_width) for x, e in line if e.half_width is not None]


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
