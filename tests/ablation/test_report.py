"""Statistics against scipy and simulation, and the table and curves of a study made by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mpformer.ablation.report import cells, markdown, table_lines, write_report
from mpformer.ablation.results import collect
from mpformer.ablation.spec import Study, load_study
from mpformer.ablation.statistics import estimate, mean_curve, paired_difference
from mpformer.tracking.record import RecordWriter


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipy_s_t_test(n):
    values = np.random.default_rng(n).normal(40, 3, n)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = estimate(values)
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.n == n


def test_a_difference_is_scipy_s_paired_one_on_the_common_seeds():
    random = np.random.default_rng(0)
    seed_effect = random.normal(0, 5, 6)
    ours = {s: 40 + seed_effect[s] + random.normal(0, 0.1) for s in (0, 1, 2, 4, 5)}
    baseline = {s: 39 + seed_effect[s] + random.normal(0, 0.1) for s in (0, 1, 3, 4, 5)}
    common = [0, 1, 4, 5]
    expected = stats.ttest_rel([ours[s] for s in common], [baseline[s] for s in common]).confidence_interval()
    found = paired_difference(ours, baseline)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(expected))
    assert found.half_width < 0.5  # the seeds' own spread of 5 has cancelled


def test_the_interval_covers_a_known_mean_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for values in random.normal(10, 2, (4000, 3)):
        found = estimate(values)
        hits += abs(found.mean - 10) <= found.half_width
    # 95 % of 4000, give or take four standard deviations of a binomial
    assert abs(hits - 3800) < 4 * math.sqrt(4000 * 0.95 * 0.05)


def test_one_value_has_no_interval_and_none_no_estimate():
    assert (estimate([3.0]).mean, estimate([3.0]).half_width) == (3.0, None)
    assert estimate([]) is None
    assert paired_difference({0: 1.0}, {1: 2.0}) is None


def test_a_mean_curve_joins_the_seeds_at_every_point_that_any_has():
    curve = mean_curve([[(0, 1.0), (10, 2.0)], [(0, 3.0), (20, math.nan)]])
    assert [(x, e.mean, e.n) for x, e in curve] == [(0, 2.0, 2), (10, 2.0, 1)]


STUDY = """\
title: A study
base: recipe.yaml
table: Paper, Table 7
columns:
  val/AP: {title: AP, paper: AP}
  val/PQ: {title: PQ, digits: 2}
baseline: plain
seeds: 3
rows:
  plain:
    title: Mask2Former
    paper: {row: first, figures: {val/AP: 39.0}}
  pilots: {settings: {model.pilot.queries: 7}}
  never: {settings: {model.pilot.queries: 8}}
"""


@pytest.fixture
def study(tmp_path) -> Study:
    (tmp_path / "recipe.yaml").write_text("data: {task: panoptic}\ntrain: {batch_size: 4}\n")
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_study(tmp_path / "study.yaml", [f"storage={tmp_path / 'runs'}"])
    figures = {
        ("plain", 0): 40.0,
        ("plain", 1): 42.0,
        ("plain", 2): 41.0,
        ("pilots", 0): 43.0,
        ("pilots", 1): 44.0,
    }
    for trial in study.trials():
        if (trial.row, trial.seed) in figures:
            write_run(trial.run_dir, figures[trial.row, trial.seed], trial.seed)
    unfinished = next(t for t in study.trials() if (t.row, t.seed) == ("pilots", 2))
    RecordWriter(unfinished.run_dir, 0).add(0, {"val/AP": 0.25})
    return study


def write_run(run_dir: Path, ap: float, seed: int) -> None:
    part = RecordWriter(run_dir, 0)
    part.add(0, {"val/AP": 0.5 + seed})
    part.add(10, {"val/AP": ap / 2, "train/loss": 3.0})
    part.add(20, {"val/AP": ap})
    (run_dir / "summary.json").write_text(json.dumps({"metrics": {"val/AP": ap}}))


def test_the_table_has_means_differences_and_dashes(study):
    table = {(cell.row, cell.metric): cell for cell in cells(study, collect(study))}
    assert (table["plain", "val/AP"].ours.mean, table["plain", "val/AP"].ours.n) == (41.0, 3)
    assert table["plain", "val/AP"].difference is None
    pilots = table["pilots", "val/AP"]
    assert (pilots.ours.mean, pilots.ours.n) == (43.5, 2)  # the unfinished third seed does not count
    assert (pilots.difference.mean, pilots.difference.n) == (2.5, 2)  # (43 - 40, 44 - 42)
    assert table["never", "val/AP"].ours is None
    assert table["plain", "val/PQ"].ours is None
    assert table["untrained", "val/AP"].ours.mean == 1.5

    text = markdown(study, cells(study, collect(study)), collect(study))
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.partition("\n## ")[0].splitlines()
        if line.startswith("|")
    }
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    # all three seeds have ended, and their evaluation has no PQ: that is not an unfinished row
    assert lines["Mask2Former (baseline)"] == ["3", f"41.0 ± {half:.1f}", "–", "39.0", "+2.0", "–†", "–"]
    assert lines["untrained model"][0] == "3"
    assert lines["pilots"][0] == "2"
    assert "study, seeds 0, 1, 2: 5 of 9 runs finished." in text
    assert "–† not applicable: no such figure of this model, or on these data." in text
    assert "– not measured." in text  # the row `never`
    assert lines["never"] == ["0", "–", "–", "–", "–", "–", "–"]
    assert lines["pilots"][2].startswith("+2.5 ± ")


def test_one_seed_is_marked(study):
    one = load_study(study.path, [f"storage={study.base.storage}", "seeds=1"])
    text = markdown(one, cells(one, collect(one)), collect(one))
    assert "43.0 *" in text
    assert "* one seed: no interval." in text


def test_the_report_is_written_as_markdown_csv_and_one_curve_per_column(study):
    text, files = write_report(study, collect(study))
    assert [path.name for path in files] == [
        "table.md",
        "table.csv",
        "report.html",
        "curve-AP.png",
        "curve-AP-steps.png",
        "curve-PQ.png",
    ]
    assert files[0].read_text() == text
    with files[1].open() as file:
        rows = {(row["row"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * 4
    plain = rows["plain", "val/AP"]
    assert (float(plain["mean"]), int(plain["n"]), float(plain["paper"])) == (41.0, 3, 39.0)
    assert float(plain["minus_paper"]) == pytest.approx(2.0)
    assert plain["paper_source"] == "Paper, Table 7, row 'first', column 'AP'"
    assert rows["never", "val/AP"]["mean"] == ""
    assert rows["plain", "val/PQ"]["n_without_metric"] == "3"
    assert rows["plain", "val/AP"]["n_without_metric"] == rows["never", "val/PQ"]["n_without_metric"] == "0"
    for picture in files[3:]:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_row_without_a_model_for_a_column_is_finished_without_it(tmp_path):
    for task in ("semantic", "panoptic"):
        (tmp_path / f"{task}.yaml").write_text(f"data: {{task: {task}}}\nmodel: {{pilot: {{queries: 0}}}}\n")
    (tmp_path / "study.yaml").write_text("""\
title: A study
parts: {classes: {base: semantic.yaml}, objects: {base: panoptic.yaml}}
columns:
  classes:val/mIoU: {title: mIoU}
  objects:val/PQ: {title: PQ}
baseline: masks
rows:
  masks: {}
  per-pixel: {settings: {model: {output: per_pixel}}, parts: {objects: null}}
""")
    study = load_study(tmp_path / "study.yaml", [f"storage={tmp_path / 'runs'}"])

    def lines() -> dict[str, list[str]]:
        header, *rows = table_lines(study, cells(study, collect(study)))
        assert header == ["", "n", "mIoU", "± to baseline", "PQ", "± to baseline"]
        return {name: values for name, *values in rows}

    assert lines()["per-pixel"] == ["0", "–", "–", "–†", "–"]
    for trial in study.trials():
        metric = "val/PQ" if trial.part == "objects" else "val/mIoU"
        RecordWriter(trial.run_dir, 0).add(20, {metric: 30.0})
        (trial.run_dir / "summary.json").write_text("{}")
    assert lines()["per-pixel"] == ["1", "30.0 *", "+0.0 *", "–†", "–"]
    assert lines()["masks (baseline)"] == ["1", "30.0 *", "–", "30.0 *", "–"]
    text = markdown(study, cells(study, collect(study)), collect(study))
    assert "–† not applicable" in text
    assert "study, seed 0: 3 of 3 runs finished." in text


def test_a_figure_that_some_seeds_have_is_their_mean(study):
    for trial in study.trials():
        if (trial.row, trial.seed) == ("plain", 0):
            RecordWriter(trial.run_dir, 20).add(20, {"val/PQ": 12.5})
    table = {(cell.row, cell.metric): cell for cell in cells(study, collect(study))}
    cell = table["plain", "val/PQ"]
    assert (cell.ours.mean, cell.n, cell.without) == (12.5, 1, 2)


def test_curves_are_against_images_seen_or_steps(study):
    run = collect(study)["plain", ""][0]
    assert run.curve("val/AP", "images") == [(0, 0.5), (40, 20.0), (80, 40.0)]
    assert run.curve("val/AP", "steps") == [(0, 0.5), (10, 20.0), (20, 40.0)]
    assert run.curve("val/PQ", "images") == []


def test_a_row_without_any_run_still_has_its_place(tmp_path, study):
    fresh = load_study(study.path, [f"storage={tmp_path / 'empty'}"])
    assert "not measured" in markdown(fresh, cells(fresh, collect(fresh)), collect(fresh))
