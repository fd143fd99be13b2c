"""A run's folder keeps what data it was begun on; its command refuses others, and says what has changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpformer.config import Config
from mpformer.config.model import Model
from mpformer.data.version import DataVersion
from mpformer.model.weights.checkpoints import MODEL_FILE, Checkpoint
from mpformer.model.weights.loading import checkpoint_metadata
from mpformer.tracking.run_dir import RunDir
from mpformer.train import launch, rundata
from mpformer.train.rundata import ChangedDataError
from mpformer.types import ClassTable, InputError
from tests.data.folders import annotation, coco_folder


@pytest.fixture
def data(tmp_path):
    return coco_folder(tmp_path / "set")


def begun(run_dir: Path, classes: ClassTable | None = None) -> Checkpoint:
    """The checkpoint of a run, with a model file that has nothing but its header."""
    folder = RunDir(run_dir).checkpoint(3)
    folder.mkdir(parents=True)
    header = checkpoint_metadata(Config(), classes or ClassTable.numbered(2))
    save_file({"a": torch.zeros(1)}, folder / MODEL_FILE, header)
    return Checkpoint(folder, 3, {})


def change(data, **categories) -> None:
    path = Path(data.root) / "train.json"
    tree = json.loads(path.read_text())
    tree["annotations"].append(annotation(99, 1))
    path.write_text(json.dumps({**tree, **categories}))


def test_a_run_goes_on_on_the_same_data_wherever_they_lie(tmp_path, data):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tags = rundata.settle(run_dir, DataVersion(data), None)
    written = (run_dir / "data.json").read_bytes()
    Path(data.root).rename(tmp_path / "moved")
    moved = data.model_copy(update={"root": str(tmp_path / "moved")})
    assert rundata.settle(run_dir, DataVersion(moved), begun(run_dir)) == tags
    assert (run_dir / "data.json").read_bytes() == written, "written once"
    assert rundata.check(run_dir, DataVersion(moved)) is None
    assert rundata.changed_data(run_dir, DataVersion(moved)) == ""


def test_a_run_with_a_checkpoint_refuses_other_data_in_one_line(tmp_path, data):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rundata.settle(run_dir, DataVersion(data), None)
    change(data)
    text = r"run was begun on other data: train\.json: 5 annotations instead of 4$"
    for compare in (
        lambda v: rundata.settle(run_dir, v, begun(run_dir)),
        lambda v: rundata.check(run_dir, v),
    ):
        with pytest.raises(ChangedDataError, match=text) as caught:
            compare(DataVersion(data))
        assert "\n" not in str(caught.value)
    assert rundata.changed_data(run_dir, DataVersion(data)).startswith("train.json: ")


def test_a_run_without_a_checkpoint_begins_anew_on_the_data_as_they_are(tmp_path, data, caplog):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first = rundata.settle(run_dir, DataVersion(data), None)
    assert rundata.settle(run_dir, DataVersion(data), None) == first
    assert caplog.text == ""
    change(data)
    second = rundata.settle(run_dir, DataVersion(data), None)
    assert second["data_version"] != first["data_version"]
    assert "has no checkpoint yet: it begins on the data as they are now" in caplog.text
    assert rundata.check(run_dir, DataVersion(data)) is None


def test_a_run_of_an_older_version_writes_its_data_down_when_it_goes_on(tmp_path, data):
    run_dir = tmp_path / "run"
    assert "kept no record" in str(rundata.check(run_dir, DataVersion(data)))
    classes = DataVersion(data).open("train").classes
    checkpoint = begun(run_dir, classes)
    rundata.settle(run_dir, DataVersion(data), checkpoint)
    change(data)
    with pytest.raises(ChangedDataError):
        rundata.settle(run_dir, DataVersion(data), checkpoint)


def test_a_run_of_an_older_version_does_not_go_on_with_other_classes(tmp_path, data):
    """Its checkpoint knows them; the model would end in a mismatch of sizes."""
    run_dir = tmp_path / "run"
    checkpoint = begun(run_dir, DataVersion(data).open("train").classes)
    categories = [
        *json.loads((tmp_path / "set/train.json").read_text())["categories"],
        {"id": 9, "name": "tree"},
    ]
    change(data, categories=categories)
    with pytest.raises(InputError, match="3 classes, but 2 are expected"):
        rundata.settle(run_dir, DataVersion(data), checkpoint)
    assert not (run_dir / "data.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_record_of_the_data_is_told_in_a_line(tmp_path, data, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError, match=r"data\.json: "):
        rundata.settle(tmp_path, DataVersion(data), None)


def test_a_full_disk_tears_no_record(tmp_path, data):
    from mpformer import atomic

    atomic._partial(tmp_path / "data.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        rundata.settle(tmp_path, DataVersion(data), None)
    assert not (tmp_path / "data.json").exists()


def test_an_unfinished_run_refuses_before_anything_starts(tmp_path, data, monkeypatch):
    """Nothing of the run's folder changes, neither its settings nor its record."""
    monkeypatch.setattr(launch, "start_ray", lambda configs: pytest.fail("Ray was started"))
    model = Model().without_pretrained()
    config = Config(model=model, data=data, storage=str(tmp_path / "runs"), tracking={"mlflow": None})
    run_dir = launch.run_directory(config)
    run_dir.mkdir(parents=True)
    rundata.settle(run_dir, DataVersion(data), None)
    monkeypatch.setattr(launch, "latest", lambda run: (begun_once, []))
    begun_once = begun(run_dir)
    change(data)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ChangedDataError):
        launch.fit(config)
    after = {
        path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert after == before
