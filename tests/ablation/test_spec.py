"""Study files: what they resolve to, and what a wrong one is told."""

from pathlib import Path

import pytest

from mpformer.ablation.plan import changes, plan_text
from mpformer.ablation.spec import load_study
from mpformer.config import run_name
from mpformer.types import InputError

RECIPE = """\
data: {task: panoptic}
model: {pilot: {queries: 50}}
train: {length: 30 steps, batch_size: 4, schedule: {kind: step, at: [0.5]}}
"""
STUDY = """\
title: A study
base: recipe.yaml
settings: {train.lr: 0.002}
table: Paper, Table 7
columns:
  val/AP: {title: AP, paper: AP50}
  val/PQ: {title: PQ}
baseline: plain
seeds: 3
rows:
  plain:
    settings:
      model.pilot.queries: 0
    paper: {row: "no layer", figures: {val/AP: 39.2}}
  poly:
    title: with poly
    settings:
      train:
        schedule: {kind: poly, power: 0.8}
      train.batch_size: 8
profiles:
  smoke:
    seeds: [5]
    settings: {train.length: 2 steps, train.batch_size: 2}
    rows: {poly: {train.length: 1 steps}}
  other:
    base: other.yaml
"""


@pytest.fixture
def study_file(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "other.yaml").write_text("data: {task: panoptic}\ntrain: {length: 7 steps}")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_rows_are_the_base_with_their_settings_laid_over(study_file):
    study = load_study(study_file)
    plain, poly = study.runs["plain", ""], study.runs["poly", ""]
    assert (plain.model.pilot.queries, poly.model.pilot.queries) == (0, 50)
    assert (plain.train.lr, poly.train.lr) == (0.002, 0.002)
    assert (plain.train.schedule.kind, poly.train.schedule.kind) == ("step", "poly")
    assert (plain.train.batch_size, poly.train.batch_size) == (4, 8)
    assert set(changes(study, "plain")) == {"model.pilot.queries"}
    assert changes(study, "poly")["train.batch_size"] == (4, 8)


def test_a_profile_is_weaker_than_a_row_and_its_rows_stronger_and_the_command_line_strongest(study_file):
    study = load_study(study_file, ["profile=smoke", "train.lr=0.5"])
    assert study.seeds == (5,)
    assert study.name == "study-smoke"
    assert (study.runs["plain", ""].train.batch_size, study.runs["poly", ""].train.batch_size) == (2, 8)
    assert (study.runs["plain", ""].train.length, study.runs["poly", ""].train.length) == (
        "2 steps",
        "1 steps",
    )
    assert {run.train.lr for run in study.runs.values()} == {0.5}
    assert load_study(study_file, ["profile=other"]).runs["plain", ""].train.length == "7 steps"
    assert load_study(study_file, ["profile=smoke", "seeds=2"]).seeds == (0, 1)


def test_trials_are_rows_times_seeds_with_names_that_depend_on_settings_and_seed_alone(study_file):
    study = load_study(study_file, ["storage=somewhere"])
    trials = study.trials()
    assert [(trial.row, trial.seed) for trial in trials] == [
        (row, seed) for seed in (0, 1, 2) for row in ("plain", "poly")
    ]
    assert len({trial.run_dir for trial in trials}) == 6
    assert all(trial.run_dir.parent == Path("somewhere/study") for trial in trials)
    assert all(trial.config.train.seed == trial.seed for trial in trials)
    again = load_study(study_file, ["cluster.workers=4", "storage=else"]).trials()
    assert [run_name(trial.config) for trial in again] == [run_name(trial.config) for trial in trials]
    other = load_study(study_file, ["train.lr=0.1"]).trials()
    assert not {run_name(t.config) for t in other} & {run_name(t.config) for t in trials}
    assert [trial.row for trial in study.trials(only="poly")] == ["poly"] * 3


def test_the_paper_s_figure_knows_where_it_stands(study_file):
    study = load_study(study_file)
    assert study.paper_figure("plain", "val/AP") == (39.2, "Paper, Table 7, row 'no layer', column 'AP50'")
    assert study.paper_figure("plain", "val/PQ") is None
    assert study.paper_figure("poly", "val/AP") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: plain", "baseline: plane", r"study\.yaml:8: baseline: no row 'plane'; nearest: plain"),
        (
            "title: with poly",
            "titel: x",
            r"study\.yaml:16: no key 'rows\.poly\.titel' in a study; nearest: title",
        ),
        (
            "model.pilot.queries",
            "model.pilot.querys",
            r"study\.yaml:13: no setting .*; nearest: model\.pilot\.queries",
        ),
        (
            "power: 0.8",
            "power: -1",
            r"study\.yaml:19: train\.schedule\.power: expected a number above 0 \(given: -1\)",
        ),
        ("figures: {val/AP", "figures: {val/APs", r"study\.yaml:14: .*no column 'val/APs'; nearest: val/AP"),
        ("figures: {val/AP", "figures: {val/PQ", r"study\.yaml:7: columns\.val/PQ: row 'plain' has a figure"),
        ("table: Paper, Table 7", "", r"figures without a table"),
        (
            "val/PQ: {",
            "val/PQs: {",
            r"study\.yaml:7: columns\.val/PQs: no metric 'val/PQs' of the task 'panoptic'; nearest: val/PQ",
        ),
        ("val/PQ: {", "diag/layer_iou: {", r"no metric 'diag/layer_iou' .*; nearest: diag/layer_iou_1"),
        ("base: recipe.yaml", "base: recip.yaml", r"study\.yaml:2: base: no file .*nearest: .*recipe\.yaml"),
        ("base: other.yaml", "base: nowhere.yaml", r"profiles\.other\.base: no file"),
        ("seeds: [5]", "seeds: [x]", r"study\.yaml:23: profiles\.smoke\.seeds: expected a list of seeds"),
        ("rows: {poly:", "rows: {poli:", r"study\.yaml:25: .*no row 'poli'; nearest: poly"),
        ("  poly:", "  po.ly:", r"study\.yaml:15: rows\.po\.ly: "),
        ("seeds: 3", "", ""),
    ],
)
def test_a_wrong_study_is_told_file_line_key_and_the_nearest_right_name(study_file, old, new, message):
    assert old in STUDY
    study_file.write_text(STUDY.replace(old, new))
    if not message:
        assert load_study(study_file).seeds == (0,)
        return
    with pytest.raises(InputError, match=message) as caught:
        load_study(study_file, ["profile=other"] if "other" in message else [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["profile=smok"], "no profile 'smok'; nearest: smoke"),
        (["train.seed=1"], r"give seeds=\[...\] instead"),
        (["seeds=none"], "expected a list of seeds"),
        (["train.lrr=1"], "no setting 'train.lrr'; nearest: train.lr"),
    ],
)
def test_wrong_settings_of_the_command_line(study_file, settings, message):
    with pytest.raises(InputError, match=message):
        load_study(study_file, settings)


def test_an_unknown_row_is_told_the_nearest(study_file):
    with pytest.raises(InputError, match="no row 'plan'; nearest: plain"):
        load_study(study_file).trials(only="plan")


def test_the_plan_counts_runs_steps_and_images_and_shows_what_a_row_changes(study_file):
    text = plan_text(load_study(study_file, [f"storage={study_file.parent}"]))
    assert "rows x seeds: 2 x 3 (seeds 0, 1, 2) = 6 runs, 180 steps, 1,080 images" in text
    assert "model.pilot.queries 50 -> 0" in " ".join(text.split())
    assert "0 finished, 0 begun, 6 to start" in text
    study = load_study(study_file, [f"storage={study_file.parent}"])
    done, begun = study.trials()[:2]
    begun.run_dir.mkdir(parents=True)
    done.run_dir.mkdir(parents=True)
    (done.run_dir / "summary.json").write_text("{}")
    assert "1 finished, 1 begun, 4 to start" in plan_text(study)
    assert "6 runs" not in plan_text(study, only="plain")
