"""The wheel in an environment and an empty folder of its own; an editable checkout in its parent folder.

The environments see the third parties of the one that runs the tests, but not its mpformer.
"""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mpformer import __version__
from tests.compilers import quick_compiler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]
PACKED = ("mpformer", "experiments", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TINY = (
    *("train.length=2 steps", "train.batch_size=2", "data.augment.size=[64, 64]", "evaluate.limit=2"),
    *("model.loss.points=64", "model.decoder.queries=5", "tracking.mlflow=null"),
    *("model.backbone.name=test_resnet", "model.backbone.pretrained=null", "model.backbone.norm=group_norm"),
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources in a folder that bears the package's name, without anything built."""
    copy = tmp_path_factory.mktemp("parent") / "mpformer"
    copy.mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """The variable that names a compiler for the kernels: what they compute is not the question here."""
    return {"CXX": quick_compiler(tmp_path_factory.mktemp("compiler"))}


@pytest.fixture(scope="module")
def wheel(checkout, compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    what = ("--no-build-isolation", "--wheel-dir", str(folder), str(checkout))
    pip(sys.executable, "wheel", *what, **compiler)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the commands of an environment with the wheel."""
    return environment(tmp_path_factory.mktemp("installed"), str(wheel))


def environment(folder: Path, *what: str, **variables: str) -> Path:
    venv.create(folder, with_pip=False)
    commands = folder / "bin"
    [site] = folder.glob("lib/python*/site-packages")
    # a path in a .pth file: the .pth files in that folder, an editable mpformer's among them, are not read
    (site / "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip(str(commands / "python"), "install", "--no-build-isolation", *what, **variables)
    return commands


def pip(python: str, command: str, *arguments: str, **variables: str) -> None:
    line = [python, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *arguments]
    run(line, Path.cwd(), **variables)


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints in a folder, with nothing of this checkout on its paths."""
    without = ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in without} | variables
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_what_is_not_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        assert email.message_from_bytes(archive.read(metadata))["Version"] == __version__
    shipped = (path.relative_to(ROOT) for path in (ROOT / "experiments").rglob("*.yaml"))
    assert {f"mpformer/{path.as_posix()}" for path in shipped} <= names
    sources = {f"mpformer/ops/csrc/{path.name}" for path in (ROOT / "mpformer/ops/csrc").glob("[!.]*")}
    assert {"mpformer/py.typed", *sources} <= names
    assert not any(name.startswith(("tests", "experiments", "benchmarks")) for name in names)


def test_the_command_that_data_check_prints_trains(installed, tmp_path):
    mpformer = str(installed / "mpformer")
    run([mpformer, "data", "synth", "flowers", "train=8", "val=2", "size=64"], tmp_path)
    told = run([mpformer, "data", "check", "flowers"], tmp_path).splitlines()[-1]
    assert told == "train on it: mpformer train laptop-instance data.root=flowers"
    arguments = told.removeprefix("train on it: mpformer ").split()
    run([mpformer, *arguments, *TINY], tmp_path)
    [summary] = tmp_path.glob("runs/laptop-instance-*/summary.json")
    assert summary.is_file()


def test_quickstart(installed, tmp_path):
    told = run([str(installed / "mpformer"), "quickstart", *TINY, "data.loader=inline"], tmp_path)
    assert "2 runs" in told
    assert len(list(tmp_path.glob("runs/quickstart*/*/summary.json"))) == 2


def test_a_study_by_its_name(installed, tmp_path):
    command = [
        str(installed / "mpformer"),
        "ablate",
        "mpformer-table8",
        "profile=smoke",
        "data.loader=inline",
    ]
    run([*command, "--only", "first-layer"], tmp_path)
    assert len(list(tmp_path.glob("runs/mpformer-table8-smoke/*/summary.json"))) == 1


def test_an_editable_checkout_works_in_its_parent_folder(checkout, compiler, tmp_path_factory):
    # the folder ./mpformer, the checkout, must not be taken for the package: not here, nor in workers
    commands = environment(tmp_path_factory.mktemp("editable"), "--editable", str(checkout), **compiler)
    parent = checkout.parent
    assert run([str(commands / "python"), "-m", "mpformer", "--version"], parent).split()[1] == __version__
    mpformer = str(commands / "mpformer")
    run([mpformer, "data", "synth", "flowers", "train=8", "val=2", "size=64"], parent)
    run(
        [mpformer, "train", "mpformer/experiments/recipes/coco-tiny.yaml", "data.root=flowers", *TINY], parent
    )
    assert list(parent.glob("runs/coco-tiny-*/summary.json"))
