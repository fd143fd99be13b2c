"""Weights that a run cannot have are told before Ray starts, whatever command asks for them."""

import pytest

from mpformer.ablation import tune
from mpformer.ablation.spec import load_study
from mpformer.cli.main import main
from mpformer.config import Config, dump_yaml
from mpformer.config.model import Model
from mpformer.train import launch
from mpformer.train.start import fetch_weights
from mpformer.types import InputError, RunError
from tests.data.folders import coco_folder
from tests.servers import closed_port

MISSING = "resnet18.a1_in1k are neither cached nor reachable"


@pytest.fixture(autouse=True)
def _without_network(monkeypatch, tmp_path):
    """No hub, an empty cache of it, and no Ray."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (launch, tune):
        monkeypatch.setattr(module, "start_ray", lambda configs: pytest.fail("Ray was started"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    backbone = {"name": "resnet18", "pretrained": "a1_in1k"}
    config = Config(
        model=Model.model_validate({"backbone": backbone}),
        data=coco_folder(tmp_path / "set"),
        storage=str(tmp_path / "runs"),
    )
    path.write_text(dump_yaml(config))
    return path


def test_train_is_one_line_that_says_what_to_do(recipe, capsys):
    assert main(["train", str(recipe)]) == 2
    line = capsys.readouterr().err
    assert MISSING in line
    assert "Connection refused" in line
    assert "model.backbone.pretrained=FILE reads a file of them" in line
    assert line.count("\n") == 1
    assert not (recipe.parent / "runs").exists()


def test_a_study_tells_it_once_where_no_row_has_its_weights(recipe):
    path = recipe.parent / "study.yaml"
    path.write_text(
        "title: x\nbase: recipe.yaml\ncolumns: {val/AP: {title: AP}}\nbaseline: a\n"
        "rows:\n  a: {}\n  b: {settings: {train.lr: 1e-5}}\n"
        "  c: {settings: {model.backbone.frozen_stages: 1}}\n"
    )
    study = load_study(path)
    with pytest.raises(InputError, match=MISSING):
        tune.run_trials(study.trials(), study.folder, study.name, None, study.bases)
    # where one row has them the study starts, and the others fail by themselves
    study = load_study(path, ["seeds=1"])
    trials = study.trials()
    random = trials[0].config.model_copy(update={"model": trials[0].config.model.without_pretrained()})
    tune._require_weights([*trials[1:], tune.Trial("a", 0, random)])


@pytest.mark.parametrize(
    ("train", "error", "told"),
    [({}, InputError, MISSING), ({"init": "hf:owner/name"}, RunError, "127.0.0.1 is not reachable")],
)
def test_only_a_run_that_has_yet_to_begin_needs_them(tmp_path, train, error, told):
    config = Config.model_validate(
        {"model": {"backbone": {"name": "resnet18", "pretrained": "a1_in1k"}}, "train": train}
    )
    with pytest.raises(error, match=told):
        fetch_weights(config, tmp_path / "new")
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    (begun / "checkpoints" / "step-00000003").mkdir(parents=True)
    finished.mkdir()
    (finished / "summary.json").write_text("{}")  # the checkpoints of a finished run may be gone
    for run_dir in (begun, finished):
        fetch_weights(config, run_dir)
    goes_on = config.train.model_copy(update={"resume_from": "runs/other"})
    fetch_weights(config.model_copy(update={"train": goes_on}), tmp_path / "new")


def test_an_architecture_from_outside_may_have_no_such_backbone(tmp_path):
    fetch_weights(Config.model_validate({"model": {"architecture": "my.models:Mine"}}), tmp_path / "new")
