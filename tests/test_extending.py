"""The worked examples of docs/extending.md: applied to a copy of the package, they train."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGE = re.compile(r"```diff\n--- (\S+)\n(.*?)```", re.DOTALL)

TRAIN = """
import torch
from mpformer.model.noise import with_noise
from mpformer.model.segmenter import build_model
from tests.model.samples import blobs, pilot_draws
from tests.train.conftest import make_batch
from tests.train.test_step import gradients_of_step, settings

config = settings(pixel_decoder={"kind": "sum"}, pilot={"noise": {"kind": "erase", "ratio": 0.5}})
assert type(build_model(config.model, 3).pixel_decoder).__name__ == "Sum"
result, gradients = gradients_of_step(config, make_batch([3, 0]))
assert torch.isfinite(result.total)
assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
masks = blobs(4).masks
erased = with_noise(masks, config.model.pilot.noise[0], config.model.pilot.rules(), pilot_draws(1), 0)
assert not (erased & ~masks).any()
assert 0.4 < float(erased.sum() / masks.sum()) < 0.6
print("trained")
"""


@pytest.mark.slow
def test_the_examples_touch_two_files_each_and_train(tmp_path):
    changes = CHANGE.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
    files = [name for name, _ in changes]
    schema = "mpformer/config/model.py"
    assert files == [schema, "mpformer/model/convolutional.py", schema, "mpformer/model/noise.py"]
    for part in ("mpformer", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, change in changes:
        lines = change.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        file = tmp_path / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name}: the example's lines are not there: {old}"
        file.write_text(text.replace(old, new), encoding="utf-8")
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # not this checkout
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], cwd=tmp_path, env=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("trained")
