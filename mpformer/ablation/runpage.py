"""The report of a single run, from its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mpformer import draw
from mpformer.ablation.page import html_page
from mpformer.ablation.tables import figure_text, markdown_table
from mpformer.config import load_config
from mpformer.tracking.record import read_metrics, read_summary, record_files
from mpformer.tracking.run_dir import RunDir
from mpformer.types import InputError, printable


def write_run_report(run_dir: Path) -> tuple[str, list[Path]]:
    """Write report/table.md, a curve per metric of the evaluations, and report.html into the run's folder.

    Returns the table as Markdown, and the files. Raises `InputError` for a folder that is no run's.
    """
    files = RunDir(run_dir)
    if not record_files(run_dir) or not files.config.is_file():
        raise InputError(
            f"{run_dir}: no run here: a study file or the folder of a run (config.yaml, metrics/) is expected"
        )
    config = load_config(files.config)
    history = read_metrics(run_dir)
    evaluations = [(step, v) for step, v in history if any(key.startswith("val/") for key in v)]
    keys = list(dict.fromkeys(key for _, v in evaluations for key in v if key.startswith("val/")))
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
    text = "\n".join(lines) + "\n"
    report = files.report
    report.path.mkdir(exist_ok=True)
    report.table.write_text(text, encoding="utf-8")
    curves = []
    for key in keys:
        points = [(step * config.train.batch_size, v[key]) for step, v in evaluations if key in v]
        path = report.curve(key.removeprefix("val/"))
        name = key.removeprefix("val/")
        drawing = partial(draw.curves, {title: points}, "training images seen", name, title, path)
        if draw.attempted(drawing, str(path)):
            curves.append(path)
    report.page.write_text(html_page(title, text, curves), encoding="utf-8")
    return text, [report.table, report.page, *curves]
