"""The report of a single run, from its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mpformer import draw
from mpformer.ablation.page import html_page
from mpformer.ablation.tables import figure_text, markdown_table
from mpformer.config import load_config
from mpformer.config.figures import AVERAGED, PLAIN
from mpformer.model.weights.checkpoints import best
from mpformer.tracking.lineage import Parent, read_parent
from mpformer.tracking.record import read_metrics, read_summary, record_files
from mpformer.tracking.run_dir import CLASSES_FILE, PICTURES, RunDir
from mpformer.types import InputError, RunError, printable


def write_run_report(run_dir: Path) -> tuple[str, list[Path]]:
    """Write report/table.md, a curve per metric of the evaluations, and report.html into the run's folder.

    The page shows the figures of each class at the last evaluation, too, if that has left any. Returns the
    table as Markdown, and the files. Raises `InputError` for a folder that is no run's, `RunError` for a
    damaged file in it.
    """
    files = RunDir(run_dir)
    if not record_files(run_dir) or not files.config.is_file():
        raise InputError(
            f"{run_dir}: no run here: a study file or the folder of a run (config.yaml, metrics/) is expected"
        )
    config = load_config(files.config)
    history = read_metrics(run_dir)
    kinds = (PLAIN, AVERAGED)
    evaluations = [(step, v) for step, v in history if any(key.startswith(kinds) for key in v)]
    keys = list(dict.fromkeys(key for _, v in evaluations for key in v if key.startswith(kinds)))
    title = f"{config.name}, seed {config.train.seed}"
    table = [["step", "images", *(key.removeprefix("val/") for key in keys)]]
    for step, values in evaluations:
        figures = (figure_text(values.get(key), 2) for key in keys)
        table.append([str(step), str(step * config.train.batch_size), *figures])
    lines = [f"# {printable(title)}", "", *markdown_table(table), ""]
    summary = read_summary(run_dir)
    if summary is None:
        lines.append(f"Not finished: the record ends at step {history[-1][0] if history else 0}.")
    else:
        speed = f"{summary['images_per_second']:.1f} images/s on {summary['device']}"
        hours = f"{summary['train_seconds'] / 3600:.2f} h of training"
        lines.append(f"{summary['steps']} steps, {speed}, {hours}.")
        if "stopped_early" in summary:
            lines.append(f"Ended before its length: {summary['stopped_early']}.")
    if (parent := read_parent(run_dir)) is not None:
        lines.append(f"Goes on from step {parent.step} of {parent.run}, whose figures up to there these are.")
    if (kept := best(run_dir)) is not None:
        lines.append(f"{kept.note}.")
    if files.classes.is_file():
        lines.append(f"Figures of each class: {PICTURES}/{CLASSES_FILE}, and on the page.")
    text = "\n".join(lines) + "\n"
    report = files.report
    report.path.mkdir(exist_ok=True)
    report.table.write_text(text, encoding="utf-8")
    curves = []
    for key in keys:
        points = [(step, v[key]) for step, v in evaluations if key in v]
        name = key.removeprefix(PLAIN)
        path = report.curve(name.replace("/", "-"))
        series = _in_images(_joined(title, points, parent), config.train.batch_size)
        drawing = partial(draw.curves, series, "training images seen", name, title, path)
        if draw.attempted(drawing, str(path)):
            curves.append(path)
    report.page.write_text(html_page(title, text + _classes(files.classes), curves), encoding="utf-8")
    return text, [report.table, report.page, *curves]


def _classes(file: Path) -> str:
    """The figures of each class as Markdown; empty where there is no such file.

    Of its columns the last three are counts of objects or pixels, the others metrics.
    """
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", newline="") as lines:
        head, *rows = csv.reader(lines)
    try:
        shown = [
            [name, *(figure_text(float(v) if v else None, 2) for v in values[:-3]), *values[-3:]]
            for name, *values in rows
        ]
        table = markdown_table([head, *shown])
    except ValueError as error:
        raise RunError(f"{file}: damaged: {error}") from None
    return "\n".join(["", "## Classes, at the last evaluation", "", *table]) + "\n"


_Points = Sequence[tuple[int, float]]
"""(step, value)."""


def _joined(title: str, points: _Points, parent: Parent | None) -> dict[str, _Points]:
    """The curve of a run; one that goes on from another begins where the curve of that one ends."""
    if parent is None:
        return {title: points}
    before = [point for point in points if point[0] <= parent.step]
    return {
        f"{parent.run}, to step {parent.step}": before,
        f"{title}, from there": [*before[-1:], *points[len(before) :]],
    }


def _in_images(series: Mapping[str, _Points], batch_size: int) -> dict[str, list[tuple[float, float]]]:
    return {name: [(step * batch_size, value) for step, value in points] for name, points in series.items()}
