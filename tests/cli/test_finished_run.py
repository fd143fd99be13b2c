"""What the commands say and write about a finished run; the commands that start runs: `tests/e2e`."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mpformer.cli import checkpoints
from mpformer.cli.main import main
from mpformer.data.catalog import open_split
from mpformer.draw import decode_png
from mpformer.evaluate import diagnostics, evaluation
from mpformer.model.architecture import build_model
from mpformer.model.weights.loading import checkpoint_metadata
from mpformer.tracking import mlflow
from mpformer.tracking.mlflow_store import client
from mpformer.tracking.record import RecordWriter
from mpformer.train import checkpoint
from mpformer.train.optim import build_optimizer
from tests.cli.conftest import FinishedRun

pytestmark = pytest.mark.slow

EVALUATED = "evaluate-step-00000020-synthetic-panoptic-val"
DIAGNOSED = "diagnose-step-00000020-synthetic-panoptic-val"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """None of these commands needs a cluster."""
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


def artifacts(run: FinishedRun, folder: str) -> set[str]:
    listed = client(run.mlflow_uri).list_artifacts(run.mlflow_run, folder)
    return {Path(artifact.path).name for artifact in listed}


def printed_figures(text: str) -> dict[str, str]:
    """{name: figure} of the lines that consist of these two."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_train_shows_a_finished_run(finished_run, capsys):
    assert main(["train", str(finished_run.recipe)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"run {finished_run.folder}"
    assert ["val/PQ", "31.25", "untrained", "1.50"] in [line.split() for line in told]
    assert told[-1] == str(finished_run.folder / "summary.json")


def test_evaluate_prints_the_figures_and_writes_their_page(finished_run, capsys):
    assert main(["evaluate", str(finished_run.folder)]) == 0
    told = capsys.readouterr().out
    config = finished_run.config
    split = open_split(config.data, "val")
    found, _ = evaluation.evaluate(finished_run.model, split, config, device="cpu")
    expected = {key: f"{value:.2f}" for key, value in {**found.scores.summary, **found.layers}.items()}
    assert expected.items() <= printed_figures(told).items()
    assert {"PQ", "AP", "mIoU", "layer_iou_1"} <= expected.keys()
    page = finished_run.folder / "pictures" / EVALUATED / "evaluation.html"
    assert str(page) in told.splitlines()
    assert page.is_file()
    assert page.name in artifacts(finished_run, f"pictures/{page.parent.name}")


def test_evaluate_takes_other_data_of_the_same_classes(finished_run, capsys, tmp_path):
    other = tmp_path / "others"
    assert main(["data", "synth", str(other), "train=1", "val=3", "size=64", "seed=7"]) == 0
    command = ["evaluate", str(finished_run.folder), "--data", str(other), "evaluate.pictures=0"]
    assert main([*command, "evaluate.limit=2"]) == 0
    assert ": 2 images of synthetic-panoptic val on cpu" in capsys.readouterr().out
    annotations = other / "annotations/panoptic_val2017.json"
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"] = "sphere"
    annotations.write_text(json.dumps(content))
    assert main(command) == 2
    assert "'sphere'" in capsys.readouterr().err


def test_data_of_the_same_name_elsewhere_have_pages_of_their_own(finished_run, tmp_path):
    origin, config = checkpoints._origin(str(finished_run.folder)), finished_run.config

    def page(root) -> str:
        data = config.data.model_copy(update={"root": str(root)})
        where = checkpoints._place_of_other_data(origin, config.model_copy(update={"data": data}))
        return origin.pictures("evaluate", "synthetic-panoptic val", where, False).name

    assert page(finished_run.scenes) == page(finished_run.scenes / ".." / "scenes") == EVALUATED
    first, second = page(tmp_path / "a" / "flowers"), page(tmp_path / "b" / "flowers")
    assert first != second
    assert re.fullmatch(rf"{EVALUATED}-in-flowers-[0-9a-f]{{6}}", first)
    assert len(os.fsencode(page(tmp_path / ("\u00fc" * 120)))) < 200


def test_diagnose_writes_the_layers_figures_and_their_pictures(finished_run, capsys, monkeypatch):
    # no query of an untrained model ends up on an object
    monkeypatch.setattr(diagnostics, "draw_layers", lambda *_: np.full((8, 6, 3), 255, np.uint8))
    assert main(["diagnose", str(finished_run.folder)]) == 0
    told = capsys.readouterr().out
    folder = finished_run.folder / "pictures" / DIAGNOSED
    figures = json.loads((folder / "layers.json").read_text())
    split = open_split(finished_run.config.data, "val")
    found = diagnostics.diagnose(
        finished_run.model, split, finished_run.config, range(2), torch.device("cpu")
    )
    assert figures == {"images": 2, **found.metrics()}
    assert found.table() in told
    [picture] = folder.glob("layers-*.png")
    assert decode_png(picture.read_bytes()).shape == (8, 6, 3)
    assert str(picture) in told.splitlines()
    recorded = client(finished_run.mlflow_uri).get_run(finished_run.mlflow_run).data.metrics
    assert recorded["diag/layer_iou_1"] == pytest.approx(found.metrics()["layer_iou_1"])


def test_predict_writes_a_picture_of_each_image_and_one_json_file(finished_run, capsys, tmp_path):
    images = sorted((finished_run.scenes / "val2017").iterdir())
    out = tmp_path / "out"
    line = ["predict", str(finished_run.folder), *map(str, images), "--out", str(out), "evaluate.batch=2"]
    assert main(line) == 0
    assert f"2 pictures and predictions.json in {out}" in capsys.readouterr().out
    assert sorted(path.stem for path in out.glob("*.png")) == [path.stem for path in images]
    content = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == list(map(str, images))
    assert content["annotations"]


def test_weights_go_out_to_hugging_face_and_come_back_the_same(finished_run, capsys, tmp_path):
    hub, back, own = tmp_path / "hub", tmp_path / "back.safetensors", tmp_path / "own.safetensors"
    assert main(["weights", "export", str(finished_run.folder), str(hub)]) == 2
    assert "pixel_decoder.channels is 16: 32 is to divide it" in capsys.readouterr().err
    wider = finished_run.config.model.pixel_decoder.model_copy(update={"channels": 32})
    settings = finished_run.config.model.model_copy(update={"pixel_decoder": wider})
    model = build_model(settings, finished_run.model.classes)
    config = finished_run.config.model_copy(update={"model": model.config})
    save_file(model.state_dict(), own, checkpoint_metadata(config, model.classes))
    assert main(["weights", "export", str(own), str(hub)]) == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in hub.iterdir()}
    assert main(["weights", "import", str(hub), str(back)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert (told[0], told[-1]) == (str(hub), str(back))
    assert "re-initialised" not in "\n".join(told).replace("re-initialised: decoder.pilot_embed.weight", "")
    returned = load_file(back)
    for name, tensor in model.state_dict().items():
        if not name.startswith("decoder.pilot_embed"):
            assert torch.equal(returned[name], tensor), name
    command = ["evaluate", str(back), "--data", str(finished_run.recipe), "evaluate.pictures=0"]
    assert main(command) == 0  # its classes are those of the data, by name


def test_report_of_a_run_prints_its_table_and_names_its_files(finished_run, capsys):
    assert main(["report", str(finished_run.folder)]) == 0
    told = capsys.readouterr().out
    table = (finished_run.folder / "report" / "table.md").read_text(encoding="utf-8")
    assert table in told
    assert [line.split() for line in table.splitlines() if line.startswith("|")][-1] == [
        *("|", "20", "|", "40", "|", "31.25", "|"),
    ]
    assert f"report: {finished_run.folder / 'report' / 'report.html'}" in told


def test_sync_says_what_mlflow_has(finished_run, capsys):
    assert main(["sync", str(finished_run.folder)]) == 0
    told = capsys.readouterr().out
    assert told == (
        f"MLflow run {finished_run.mlflow_run} at {finished_run.mlflow_uri} has the record up to step 20\n"
    )


@pytest.fixture
def study(finished_run, tmp_path) -> Path:
    """A study of one row whose only run is the finished one, as its own command would have left it."""
    path = tmp_path / "study.yaml"
    content = {
        "title": "A study – of one row",
        "base": str(finished_run.recipe),
        "settings": {"storage": str(tmp_path / "runs"), "tracking.mlflow": None},
        "columns": {"val/PQ": {"title": "PQ"}, "diag/pilot_layer_iou_1": {"title": "pilots"}},
        "baseline": "tiny",
        "rows": {"tiny": {}},
    }
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    from mpformer.ablation.spec import load_study

    [trial] = load_study(path).trials()
    shutil.copytree(finished_run.folder, trial.run_dir)
    (trial.run_dir / "mlflow.json").unlink()
    return path


def test_ablate_of_finished_runs_measures_what_is_missing_and_writes_the_table(study, capsys):
    assert main(["ablate", str(study)]) == 0
    told = capsys.readouterr().out
    assert "study: 1 runs in" in told
    assert "1 finished, 0 begun, 0 to start" in told
    assert "tiny s0: figures of the pilots measured" in told
    folder = study.parent / "runs" / "study"
    rows = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    means = {(row["row"], row["metric"]): row["mean"] for row in rows}
    assert float(means["tiny", "val/PQ"]) == 31.25
    assert 0 <= float(means["tiny", "diag/pilot_layer_iou_1"]) <= 100
    assert float(means["untrained", "val/PQ"]) == 1.5

    assert main(["report", str(study)]) == 0
    again = capsys.readouterr().out
    assert (folder / "table.md").read_text(encoding="utf-8") in again
    assert f"report: {folder / 'report.html'}" in again


def test_what_was_measured_without_pictures_reaches_mlflow(finished_run):
    told = mlflow.attach(finished_run.folder, 20, {"diag/pilot_layer_iou_9": 62.5, "val/PQ": 1.0})
    assert told == f"MLflow run {finished_run.mlflow_run} at {finished_run.mlflow_uri} has it, too"
    store = client(finished_run.mlflow_uri)
    history = store.get_metric_history(finished_run.mlflow_run, "diag/pilot_layer_iou_9")
    assert [(one.step, one.value) for one in history] == [(20, 62.5)]
    assert store.get_run(finished_run.mlflow_run).data.metrics["val/PQ"] == 31.25  # the record's own


def test_with_the_best_figures_the_pilots_are_measured_on_the_best_weights(
    study, finished_run, capsys, monkeypatch
):
    attached = []
    monkeypatch.setattr(mlflow, "attach", lambda *told: attached.append(told))
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    content["settings"]["train.keep.best"] = "val/PQ"
    study.write_text(yaml.safe_dump({**content, "figures": "best"}), encoding="utf-8")
    [run_dir] = (study.parent / "runs/study").iterdir()
    shutil.rmtree(run_dir / "metrics")
    writer = RecordWriter(run_dir, 0)
    for step, quality in ((10, 40.0), (20, 31.25)):
        writer.add(step, {"val/PQ": quality})
    torch.manual_seed(1)
    model, config = build_model(finished_run.config.model, finished_run.model.classes), finished_run.config
    checkpoint.save(run_dir, 10, model, build_optimizer(model, config.train), config, {"train_seconds": 60.0})
    assert main(["ablate", str(study)]) == 0
    split = open_split(config.data, "val")
    found = diagnostics.diagnose(model, split, config, device="cpu", quality=False).metrics()
    rows = csv.DictReader((study.parent / "runs/study/table.csv").open(encoding="utf-8"))
    means = {row["metric"]: row["mean"] for row in rows if row["row"] == "tiny"}
    assert float(means["val/PQ"]) == 40.0
    assert float(means["diag/pilot_layer_iou_1"]) == pytest.approx(found["pilot_layer_iou_1"])
    [(run, step, values)] = attached
    assert (run, step) == (run_dir, 10)
    assert values["diag/pilot_layer_iou_1"] == pytest.approx(found["pilot_layer_iou_1"])
    capsys.readouterr()

    shutil.rmtree(run_dir / "checkpoints" / "step-00000010")
    (run_dir / "diagnose.json").unlink()
    assert main(["ablate", str(study)]) == 0
    told = capsys.readouterr().out
    assert "tiny s0: the pilots cannot be measured, their weights are gone: " in told
    rows = csv.DictReader((study.parent / "runs/study/table.csv").open(encoding="utf-8"))
    assert [row["n"] for row in rows if row["metric"].startswith("diag/") and row["row"] == "tiny"] == ["0"]


def test_report_from_mlflow_needs_a_store(study, capsys):
    assert main(["report", str(study), "from=mlflow"]) == 2
    assert "tracking.mlflow is null" in capsys.readouterr().err


def test_ablate_plan_says_what_would_be_done(study, capsys):
    assert main(["ablate", str(study), "--plan", "seeds=2"]) == 0
    told = capsys.readouterr().out
    assert "study: A study – of one row" in told
    assert "rows x seeds: 1 x 2 (seeds 0, 1) = 2 runs, 40 steps, 80 images" in told
    assert told.rstrip().endswith("1 finished, 0 begun, 1 to start")
