"""The points of a random search, and the runs that they are."""

import json
import math
from pathlib import Path

import pytest
import yaml

from mpformer.ablation import tune
from mpformer.ablation.search import draw, samples, table
from mpformer.ablation.spec import Study, load_study
from mpformer.ablation.studyfile import Search
from mpformer.cli import studies
from mpformer.tracking.record import RecordWriter
from mpformer.types import InputError

STUDY = Path(__file__).parents[2] / "experiments/ablations/search-noise.yaml"
SPACE = {
    "a": {"uniform": [-1.0, 3.0]},
    "b": {"loguniform": [1e-4, 1e-1]},
    "c": {"integers": [1, 3]},
    "d": {"choice": ["x", None, [1, 2]]},
}


def search(samples: int, seed: int = 0) -> Search:
    return Search.model_validate(
        {"space": SPACE, "samples": samples, "column": "val/AP", "row": "r", "seed": seed}
    )


def test_points_fill_the_space_and_are_the_same_at_every_call():
    points = draw(search(2000))
    assert points[:50] == draw(search(50))
    assert points != draw(search(2000, seed=1))
    assert all(-1 <= p["a"] <= 3 and 1e-4 <= p["b"] <= 1e-1 for p in points)
    assert abs(sum(p["a"] for p in points) / 2000 - 1) < 4 * (4 / math.sqrt(12)) / math.sqrt(2000)
    assert 850 < sum(p["b"] < 10**-2.5 for p in points) < 1150  # half of them below the geometric middle
    assert {p["c"] for p in points} == {1, 2, 3}
    assert {str(p["d"]) for p in points} == {"x", "None", "(1, 2)"} or {str(p["d"]) for p in points} == {
        "x",
        "None",
        "[1, 2]",
    }


def test_a_sample_is_the_row_with_its_settings(tmp_path):
    study = load_study(STUDY, ["profile=smoke", f"storage={tmp_path}"])
    first, *others = samples(study)
    pilot = first.trial.config.model.pilot
    assert pilot.noise[0].ratio == first.settings["model.pilot.noise.ratio"]
    assert pilot.layers == first.settings["model.pilot.layers"]
    assert first.trial.config.train == study.runs["mp-former", ""].train
    assert len({one.trial.run_dir for one in [first, *others]}) == 20
    assert first.trial.tags == {
        "varied_row": "mp-former",
        **{f"search.{key}": str(value) for key, value in first.settings.items()},
    }

    assert first.stopped_at is None
    first.trial.run_dir.mkdir(parents=True)
    (first.trial.run_dir / "stopped.json").write_text(json.dumps({"by": "asha", "step": 3}))
    lines = table([(first, None), (others[0], 2.5), (others[1], 7.25)], "val/AP", "AP").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "sample-002",
        "sample-001",
        "sample-000",
    ]
    assert lines[-1].endswith("stopped at step 3 |")


def test_of_losses_the_smallest_is_the_best(tmp_path):
    study = load_study(STUDY, ["profile=smoke", f"storage={tmp_path}"])
    first, second, third, *_ = samples(study)
    lines = table([(first, 2.5), (second, None), (third, 0.5)], "val/loss", "loss").splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == [one.trial.config.name for one in (third, first, second)]


def searched(folder: Path, **changed) -> Study:
    """A study with a search of two samples, whose runs and row have ended."""
    (folder / "recipe.yaml").write_text("train: {batch_size: 4}\nmodel: {backbone: {pretrained: null}}\n")
    tree = {
        "title": "x",
        "base": "recipe.yaml",
        "columns": {"val/AP": {"title": "AP"}},
        "baseline": "a",
        "rows": {"a": {}},
        "settings": {"train.keep.best": "val/AP", "tracking.mlflow": None, "storage": str(folder / "runs")},
        "search": {
            "space": {"train.lr": {"choice": [1e-3, 1e-4]}},
            "samples": 2,
            "column": "val/AP",
            "row": "a",
        },
        **changed,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return load_study(folder / "study.yaml")


@pytest.mark.parametrize(("figures", "order"), [("last", ["001", "000"]), ("best", ["000", "001"])])
def test_the_table_takes_the_weights_that_the_study_takes(tmp_path, figures, order, capsys):
    study = searched(tmp_path, figures=figures)
    for one, best, last in zip(samples(study), (40.0, 30.0), (10.0, 20.0)):
        writer = RecordWriter(one.trial.run_dir, 0)
        writer.add(5, {"val/AP": best})
        writer.add(10, {"val/AP": last})
        (one.trial.run_dir / "summary.json").write_text("{}")
    assert studies._search(study, study.file.search, "") == []
    text = (study.folder / "search.md").read_text()
    lines = [line for line in text.splitlines() if "sample-" in line]
    assert [line.split("|")[1].strip().removeprefix("sample-") for line in lines] == order
    assert lines[0].endswith("40.00 |" if figures == "best" else "20.00 |")
    assert ("they flatter" in text) == (figures == "best")


def test_samples_have_one_figure_that_decides_which_weights_are_the_best(tmp_path):
    space = {"train.keep.best": {"choice": ["val/AP", None]}}
    search = {"space": space, "column": "val/AP", "row": "a"}
    with pytest.raises(InputError, match=r"study\.yaml:\d+: figures: best takes one train\.keep\.best"):
        searched(tmp_path, figures="best", search=search)


def test_asha_is_refused_a_column_that_no_evaluation_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "start_ray", lambda configs: pytest.fail("Ray was started"))
    monkeypatch.setattr(tune, "check_root", lambda data: None)
    study = searched(
        tmp_path,
        columns={"diag/pilot_layer_iou_1": {"title": "pilots"}},
        settings={"evaluate.every": "5 steps", "train.length": "10 steps", "storage": str(tmp_path / "runs")},
        search={
            "space": {"train.lr": {"choice": [1]}},
            "column": "diag/pilot_layer_iou_1",
            "row": "a",
            "stop": "asha",
        },
    )
    trials = [one.trial for one in samples(study)]
    with pytest.raises(InputError, match=r"asha .* none of them measures diag/pilot_layer_iou_1"):
        tune.run_trials(trials, study.folder, study.name, None, study.bases, study.file.search)
