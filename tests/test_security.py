"""Secrets stay out of settings and their copies; YAML and checkpoints carry no code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mpformer.config import load_config
from mpformer.types import InputError

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "experiments" / "recipes" / "coco-tiny.yaml"


@pytest.mark.parametrize(
    ("key", "uri"),
    [
        ("tracking.mlflow", "postgresql://me:hunter2@db/mlflow"),
        ("tracking.mlflow", "https://me:hunter2@mlflow.example.org"),
        ("cluster.mirror", "s3://key:hunter2@bucket/runs"),
        ("cluster.mirror", "s3://bucket/runs?secret_key=hunter2"),
        ("data.root", "s3://key:hunter2@bucket/data"),
        ("train.init", "https://me:hunter2@host/weights.pkl"),
        ("train.init", "https://host/weights.pkl?X-Amz-Signature=hunter2"),
    ],
)
def test_a_secret_in_the_settings_is_refused_and_not_repeated(key, uri):
    with pytest.raises(InputError, match=f"{key} holds a secret") as caught:
        load_config(RECIPE, [f"{key}={uri}"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["tracking.mlfow", "train.lr", "model.backbone.norm"])
def test_a_password_in_the_wrong_place_is_not_repeated(key):
    with pytest.raises(InputError) as caught:
        load_config(RECIPE, [f"{key}=postgresql://me:hunter2@db/mlflow"])
    assert "hunter2" not in str(caught.value)
    assert "me:***@db" in str(caught.value)


def test_addresses_without_secrets_are_taken():
    settings = [
        "tracking.mlflow=postgresql://me@db/mlflow",
        "cluster.mirror=s3://bucket/runs?region=eu-west-1",
    ]
    config = load_config(RECIPE, settings)
    assert config.tracking.mlflow == "postgresql://me@db/mlflow"


def test_yaml_that_asks_for_code_is_refused(tmp_path):
    marker = tmp_path / "was-run"
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"name: !!python/object/apply:pathlib.Path.touch [!!python/name:x {marker}]\n")
    with pytest.raises((InputError, yaml.YAMLError)) as caught:
        load_config(recipe)
    assert isinstance(caught.value, InputError)
    assert not marker.exists()


def test_a_pickled_checkpoint_of_another_tool_runs_no_code(tmp_path):
    """`weights import` of a file whose pickle would run a command."""
    program = (
        "import os, pickle, sys\n"
        "class Evil:\n"
        "    def __reduce__(self): return (os.system, ('touch ' + sys.argv[2],))\n"
        "pickle.dump({'model': Evil()}, open(sys.argv[1], 'wb'))\n"
    )
    source, marker = tmp_path / "evil.pkl", tmp_path / "was-run"
    subprocess.run([sys.executable, "-c", program, source, marker], check=True)
    from mpformer.cli.weights import weights_import

    with pytest.raises(InputError):
        weights_import(str(source), str(tmp_path / "out.safetensors"))
    assert not marker.exists()


def test_no_source_binds_to_other_than_loopback():
    for path in (ROOT / "mpformer").rglob("*.py"):
        assert "0.0.0.0" not in path.read_text(), path


def test_the_dependency_audit_says_when_it_cannot_look(tmp_path):
    """Without pip-audit, or without network, the audit is a message and not a failure."""
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "audit", str(tmp_path / "no-such-python")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.dumps("not audited")[1:-1] in done.stdout
