"""A search with ASHA through Tune: samples that lag behind are stopped, and none is run a second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpformer.ablation.search import samples
from mpformer.ablation.spec import load_study
from mpformer.tracking.mlflow_store import client
from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STUDY = """\
title: A search
base: tiny.yaml
settings: {train.length: 12 steps, evaluate.every: 3 steps}
columns:
  val/mIoU: {title: mIoU}
baseline: piloted
rows:
  piloted: {}
search:
  row: piloted
  column: val/mIoU
  samples: 3
  space:
    train.lr: {loguniform: [1e-5, 1e-2]}
    model.pilot.layers: {choice: [first, all]}
  stop: asha
  reduction: 2
"""


def test_a_search_stops_samples_and_does_not_run_any_twice(recipe: Path, head: Cluster) -> None:
    path = recipe.parent / "study.yaml"
    path.write_text(STUDY)
    done = head.command("ablate", path)
    assert done.code == 0, done.err
    found = samples(load_study(path))
    ended = [one for one in found if one.trial.finished]
    stopped = [one for one in found if one.stopped_at is not None]
    assert len(ended) + len(stopped) == 3
    assert ended
    assert all(one.stopped_at in (3, 6, 9) for one in stopped)
    best = max(
        json.loads((o.trial.run_dir / "summary.json").read_text())["metrics"]["val/mIoU"] for o in ended
    )
    table = (load_study(path).folder / "search.md").read_text()
    assert f"{best:.2f} |" in table.splitlines()[2]

    store = client(f"sqlite:///{load_study(path).base.storage}/mlflow.db")
    for one in found:
        link = json.loads((one.trial.run_dir / "mlflow.json").read_text())
        child = store.get_run(link["run_id"])
        for key, value in one.settings.items():
            assert child.data.tags[f"search.{key}"] == str(value)
        # the base trains with pilots in all layers
        assert child.data.params["train.lr"] == str(one.settings["train.lr"])
        assert child.data.tags["varied_row"] == "piloted"
        assert child.info.status == ("FINISHED" if one.trial.finished else "KILLED")

    before = {p: p.stat().st_mtime_ns for p in load_study(path).folder.rglob("*.jsonl")}
    again = head.command("ablate", path)
    assert again.code == 0, again.err
    assert "3 samples of row piloted, 0 to run" in again.out
    assert {p: p.stat().st_mtime_ns for p in load_study(path).folder.rglob("*.jsonl")} == before
