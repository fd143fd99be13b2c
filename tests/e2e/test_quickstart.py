"""The first command of the README, with settings that make it short."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.e2e.conftest import RECIPE, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_quickstart_makes_its_data_and_its_table(
    tmp_path: Path, head: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # data and runs go below the folder that the command is given in
    model = {key: value for key, value in RECIPE["model"].items() if key != "pilot"}  # the rows set that
    small = [f"model.{part}.{key}={value}" for part, keys in model.items() for key, value in keys.items()]
    settings = [
        *small,
        "train.length=2 steps",
        "train.batch_size=2",
        "evaluate.limit=2",
        "evaluate.every=null",
    ]
    settings = [setting.replace("=None", "=null") for setting in settings]
    done = head.command("quickstart", *settings)
    assert done.code == 0, done.err
    assert ", made in " in done.out
    (table,) = tmp_path.glob("runs/*/table.csv")
    with table.open() as file:
        cells = {(line["row"], line["metric"]): line["mean"] for line in csv.DictReader(file)}
    for row in ("mask2former", "mp-former"):
        assert 0 <= float(cells[row, "val/mIoU"]) <= 100
    assert (table.parent / "report.html").stat().st_size > 10_000

    again = head.command("quickstart", *settings)
    assert again.code == 0, again.err
    assert "as it was" in again.out
    assert "2 finished, 0 begun, 0 to start" in again.out
