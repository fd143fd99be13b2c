"""The report of one run's folder."""

import json

import pytest

from mpformer.ablation.runpage import write_run_report
from mpformer.config import Config, dump_yaml
from mpformer.tracking.record import RecordWriter
from mpformer.types import InputError


def test_a_run_s_folder_gives_its_table_curves_and_page(tmp_path):
    config = Config.model_validate({"name": "mine", "train": {"batch_size": 4, "seed": 3}})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    part = RecordWriter(tmp_path, 0)
    part.add(5, {"train/loss": 3.0})
    part.add(10, {"val/AP": 12.5, "val/PQ": 20.0})
    part.add(20, {"val/AP": 25.0})
    text, files = write_run_report(tmp_path)
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line] for line in (table[0], *table[2:])] == [
        ["step", "images", "AP", "PQ"],
        ["10", "40", "12.50", "20.00"],
        ["20", "80", "25.00", "–"],
    ]
    assert "Not finished: the record ends at step 20." in text
    assert [path.name for path in files] == ["table.md", "report.html", "curve-AP.png", "curve-PQ.png"]
    assert "<h1>mine, seed 3</h1>" in files[1].read_text()

    summary = {"steps": 20, "images_per_second": 8.0, "device": "cpu", "train_seconds": 1800}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "20 steps, 8.0 images/s on cpu, 0.50 h of training." in write_run_report(tmp_path)[0]


def test_another_folder_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        write_run_report(tmp_path)
