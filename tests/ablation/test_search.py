"""The points of a random search, and the runs that they are."""

import json
import math
from pathlib import Path

from mpformer.ablation.search import draw, samples, table
from mpformer.ablation.spec import load_study
from mpformer.ablation.studyfile import Search

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
