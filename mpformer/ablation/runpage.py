"""The report of a single run, from its folder."""

from __future__ import annotations

from pathlib import Path

from mpformer import draw
from mpformer.ablation.page import html_page
from mpformer.config import load_config
from mpformer.tracking.record import parts, read_metrics, read_summary
from mpformer.tracking.run_dir import RunDir
from mpformer.types import InputError


def write_run_report(run_dir: Path) -> tuple[str, list[Path]]:
    """Write report/table.md, a curve per metric of the evaluations, and report.html into the run's folder.

    Raises `InputError` for a folder that is no run's.
    """
    files = RunDir(run_dir)
    if not parts(run_dir) or not files.config.is_file():
        raise InputError(
            f"{run_dir}: no run here: a study file or a run's folder (config.yaml, metrics/) is expected"
        )
    config = load_config(files.config)
    history = read_metrics(run_dir)
    evaluations = [(step, v) for step, v in history if any(key.startswith("val/") for key in v)]
    keys = list(dict.fromkeys(key for _, v in evaluations for key in v if key.startswith("val/")))
    title = f"{config.name}, seed {config.train.seed}"
    lines = [f"# {title}", "", "| step | images | " + " | ".join(k.removeprefix("val/") for k in keys) + " |"]
    lines.append("|---:|---:|" + "---:|" * len(keys))
    for step, values in evaluations:
        figures = " | ".join(f"{values[key]:.2f}" if key in values else "–" for key in keys)
        lines.append(f"| {step} | {step * config.train.batch_size} | {figures} |")
    summary = read_summary(run_dir)
    if summary is None:
        lines += ["", f"Not finished: the record ends at step {history[-1][0] if history else 0}."]
    else:
        speed = f"{summary['images_per_second']:.1f} images/s on {summary['device']}"
        lines += [
            "",
            f"{summary['steps']} steps, {speed}, {summary['train_seconds'] / 3600:.2f} h of training.",
        ]
    text = "\n".join(lines) + "\n"
    report = files.report
    report.path.mkdir(exist_ok=True)
    report.table.write_text(text, encoding="utf-8")
    curves = []
    for key in keys:
        points = [(step * config.train.batch_size, v[key]) for step, v in evaluations if key in v]
        path = report.curve(key.removeprefix("val/"))
        draw.curves({title: points}, "training images seen", key.removeprefix("val/"), title, path)
        curves.append(path)
    report.page.write_text(html_page(title, text, curves), encoding="utf-8")
    return text, [report.table, report.page, *curves]
