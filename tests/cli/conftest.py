"""A finished run of a tiny model on generated scenes, made without training."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mpformer.config import Config, dump_yaml, load_config
from mpformer.data.catalog import open_split
from mpformer.data.synthetic import generate
from mpformer.model.architecture import Architecture, build_model
from mpformer.tracking.entry import Entry
from mpformer.tracking.mlflow_store import prepare_store
from mpformer.tracking.tracker import Tracker
from mpformer.train import checkpoint
from mpformer.train.launch import run_directory
from mpformer.train.optim import build_optimizer

ROOT = Path(__file__).parents[2]
RECIPE = """\
data:
  root: {root}/scenes
  task: panoptic
  dataset: {dataset}
  test_resize: {{short: 64, long: 64}}
  augment: {{size: [64, 64]}}
model:
  backbone: {{name: resnet18, pretrained: null}}
  pixel_decoder: {{channels: 16, layers: 1, heads: 2, ffn: 16}}
  decoder: {{layers: 2, queries: 6, heads: 2, ffn: 16}}
  pilot: {{queries: 6}}
  loss: {{points: 64}}
train: {{length: 20 steps, batch_size: 2}}
evaluate: {{class_confidence: 0.0, overlap: 0.1, pictures: 1}}
storage: {root}/runs
"""


@dataclass(frozen=True)
class FinishedRun:
    recipe: Path
    folder: Path
    config: Config
    model: Architecture
    scenes: Path
    mlflow_uri: str
    mlflow_run: str


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("finished")
    generate(root / "scenes", {"train": 4, "val": 2}, size=64)
    recipe = root / "tiny.yaml"
    recipe.write_text(RECIPE.format(root=root, dataset=ROOT / "experiments/data/synthetic-panoptic.yaml"))
    config = load_config(recipe)
    folder = run_directory(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))

    torch.manual_seed(0)
    model = build_model(config.model, open_split(config.data, "val").classes)
    uri = prepare_store(config, "tiny")
    assert uri is not None
    tracker = Tracker.open(
        folder, config, start_step=0, entry=Entry("tiny"), mlflow_uri=uri, run_name=folder.name
    )
    for step, quality in ((0, 1.5), (10, 20.0), (20, 31.25)):
        tracker.log(step, {"val/PQ": quality, "train/loss": 30.0 - step, "speed/train_seconds": 6.0 * step})
    checkpoint.save(folder, 20, model, build_optimizer(model, config.train), config, {"train_seconds": 120.0})
    tracker.commit(20)
    summary = {
        "steps": 20,
        "metrics": {"val/PQ": 31.25},
        "untrained_metrics": {"val/PQ": 1.5},
        "images_per_second": 0.5,
        "device": "cpu",
        "train_seconds": 120.0,
        "workers": 1,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    tracker.finish()
    assert tracker.mlflow_run_id is not None
    return FinishedRun(recipe, folder, config, model, root / "scenes", uri, tracker.mlflow_run_id)
