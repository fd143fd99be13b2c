"""Labels that change under a run: on others it does not go on, and on its own as if nothing had been."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mpformer.types import RunError
from tests.e2e.conftest import Cluster, write_recipe
from tests.e2e.faults import assert_as_unbroken, run_dir_of, starts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def add_a_class(scenes: Path) -> None:
    for path in (scenes / "annotations").glob("panoptic_*.json"):
        tree = json.loads(path.read_text())
        tree["categories"].append({"id": 99, "name": "tree", "isthing": 1})
        path.write_text(json.dumps(tree))


def test_labels_that_change_between_two_checkpoints(
    scenes: Path,
    unbroken: Path,
    head: Cluster,
    tmp_path: Path,
    empty_store: Path,
    at_checkpoint: Callable[[int, Callable[[], object]], None],
) -> None:
    own = tmp_path / "scenes"
    shutil.copytree(scenes, own)
    recipe = write_recipe(tmp_path, own, empty_store)

    def cut_off() -> None:
        raise RunError("cut off")

    at_checkpoint(6, cut_off)
    done = head.train(recipe)
    assert done.code == 1, done.err
    run_dir = run_dir_of(recipe)

    add_a_class(own)
    refused = head.train(recipe)
    assert refused.code == 2
    assert "panoptic_train2017.json: 1 class added ('tree')" in refused.err
    assert refused.err.count("\n") == 1
    assert len(starts(run_dir)) == 1

    shutil.rmtree(own)
    shutil.copytree(scenes, own)
    at_checkpoint(9, lambda: add_a_class(own))  # while it trains: what it has read stays as it was
    done = head.train(recipe)
    assert done.code == 0, done.err
    assert_as_unbroken(run_dir, unbroken)
    refused = head.train(recipe)
    assert refused.code == 2, "a finished run"
    assert "1 class added ('tree')" in refused.err
