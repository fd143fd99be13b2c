"""A recipe that trains in seconds, on generated data, and a way to run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "data": {
        "dataset": {
            "name": "tiny-scenes",
            "format": "coco_panoptic",
            **{
                split: {
                    "images": f"{split}2017",
                    "annotations": f"annotations/panoptic_{split}2017.json",
                    "panoptic_masks": f"annotations/panoptic_{split}2017",
                }
                for split in ("train", "val")
            },
        },
        "task": "panoptic",
        "augment": {"size": [64, 64], "scale": [0.5, 2.0]},
        "test_resize": {"short": 64, "long": 64},
    },
    "model": {
        "backbone": {"name": "resnet18", "pretrained": None, "norm": "group_norm"},
        "pixel_decoder": {"channels": 16, "layers": 1, "heads": 2, "ffn": 16},
        "decoder": {"queries": 8, "layers": 2, "heads": 2, "ffn": 16},
        "pilot": {"queries": 8},
        "loss": {"points": 64},
    },
    "train": {
        "length": "12 steps",
        "batch_size": 4,
        "lr": 1e-3,
        "clip_norm": 1.0,
        "checkpoint_every": "3 steps",
        "log_every": 1,
    },
    "evaluate": {"every": "6 steps", "pictures": 0},
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 5 validation scenes of 64x64."""
    from mpformer.data.synthetic import generate

    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, images={"train": 24, "val": 5}, seed=1, size=64, things=3)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, scenes: Path) -> Path:
    """The recipe as a file; runs go to `runs/` beside it."""
    tree = {**RECIPE, "storage": str(tmp_path / "runs")}
    tree["data"] = {**RECIPE["data"], "root": str(scenes)}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def unbroken(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = folder / "tiny.yaml"
    data = {**RECIPE["data"], "root": str(scenes)}
    path.write_text(yaml.safe_dump({**RECIPE, "data": data, "storage": str(folder / "runs")}))
    done = run("train", path, timeout=300)
    assert done.returncode == 0, done.stderr
    (summary,) = folder.glob("runs/*/summary.json")
    return summary.parent


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`python -m mpformer ...` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mpformer", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def run(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(*arguments)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
