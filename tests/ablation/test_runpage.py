"""The report of one run's folder."""

import json
import re

import numpy as np
import pytest

from mpformer import draw
from mpformer.ablation.runpage import write_run_report
from mpformer.config import Config, dump_yaml
from mpformer.evaluate.confusion import classes_csv
from mpformer.evaluate.prediction import Scores
from mpformer.tracking.lineage import Parent
from mpformer.tracking.record import RecordWriter, inherit
from mpformer.types import ClassInfo, ClassTable, InputError, RunError


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


def test_the_page_shows_each_class_as_the_last_evaluation_left_it(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(Config(name="mine")))
    RecordWriter(tmp_path, 0).add(10, {"val/AP": 12.5})
    assert "Classes" not in write_run_report(tmp_path)[1][1].read_text()
    classes = tmp_path / "pictures" / "classes.csv"
    classes.parent.mkdir()
    scores = Scores({}, {"disk": {"AP": 33.3333, "PQ": 50.0}, "a|b": {"PQ": 1e-5}})
    table = ClassTable(tuple(ClassInfo(name, i, True, (0, 0, 0)) for i, name in enumerate(("disk", "a|b"))))
    matrix = np.array([[3, 0, 1], [0, 2, 0], [1, 0, 0]])
    classes.write_text(classes_csv(scores, matrix, table), encoding="utf-8")
    text, files = write_run_report(tmp_path)
    assert "Figures of each class: pictures/classes.csv, and on the page." in text
    assert "disk" not in text  # there may be a thousand
    rows = re.findall(r"<tr>(.*?)</tr>", files[1].read_text().partition("Classes, at the last evaluation")[2])
    assert [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows] == [
        ["class", "AP", "PQ", "true", "found", "right"],
        ["disk", "33.33", "50.00", "4", "4", "3"],
        ["a|b", "–", "0.00", "2", "2", "2"],
    ]
    classes.write_text("class,AP,true,found,right\ndisk,much,1,1,1\n")
    with pytest.raises(RunError, match=r"classes\.csv: damaged"):
        write_run_report(tmp_path)


def test_another_folder_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        write_run_report(tmp_path)


def test_the_curve_of_a_run_that_goes_on_from_another_is_joined_to_that_one_s(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    config = Config.model_validate({"name": "mine", "train": {"batch_size": 4, "keep": {"best": "val/AP"}}})
    for run_dir in (first, second):
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(dump_yaml(config))
    part = RecordWriter(first, 0)
    for step, value in ((10, 5.0), (20, 8.0), (30, 7.0)):
        part.add(step, {"val/AP": value, "val_ema/AP": value + 1})
    inherit(second, first, 20)
    Parent("first", 20).write(second)
    RecordWriter(second, 20).add(40, {"val/AP": 12.0})
    drawn, curves = {}, draw.curves

    def recorded(series, xlabel, ylabel, *others):
        drawn[ylabel] = series
        return curves(series, xlabel, ylabel, *others)

    monkeypatch.setattr(draw, "curves", recorded)
    text, files = write_run_report(second)
    assert "Goes on from step 20 of first, whose figures up to there these are." in text
    assert drawn["AP"] == {
        "first, to step 20": [(40, 5.0), (80, 8.0)],
        "mine, seed 0, from there": [(80, 8.0), (160, 12.0)],
    }
    assert [path.name for path in files][2:] == ["curve-AP.png", "curve-val_ema-AP.png"]
