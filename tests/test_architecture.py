"""Who may import whom, and what starts without torch or ray: DESIGN section 2, read from the sources."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "mpformer").rglob("*.py"))

BASE = {
    "filekind",
    "home",
    "types",
    "atomic",
    "cores",
    "shell",
    "plugin",
    "config",
    "capacity",
    "tracking",
    "lettering",
    "draw",
}
ALLOWED = {
    "types": set(),
    "atomic": set(),
    "cores": set(),
    "shell": set(),
    "filekind": set(),
    "home": {"types"},
    "plugin": {"types"},
    "config": {"types", "plugin"},
    "capacity": {"types", "config"},
    "lettering": {"types"},
    "draw": {"types", "lettering"},
    "tracking": {"types", "atomic", "shell", "plugin", "config"},
    "ops": BASE,
    "model": BASE | {"ops"},
    "data": BASE,
    "evaluate": BASE | {"ops", "model", "data"},
    "train": BASE | {"ops", "model", "data", "evaluate"},
    "ablation": BASE | {"ops", "model", "data", "evaluate", "train"},
    "cli": BASE | {"ops", "model", "data", "evaluate", "train", "ablation"},
    "__main__": {"cli"},
    "__init__": {"config", "model", "evaluate", "ops"},
}
"""What each module or package of mpformer may import of mpformer, itself aside."""

FENCES = {
    "ray": {
        *("data/pipeline", "evaluate/inference", "evaluate/batch_job"),
        *("train/worker", "train/launch", "train/background"),
        *("ablation/tune", "cli/doctor"),
    },
    "mlflow": {"tracking/mlflow_store", "tracking/mlflow", "ablation/results", "cli/doctor"},
    "sqlalchemy": {"tracking/mlflow_store"},
    "timm": {"model/backbone"},
    "huggingface_hub": {"model/backbone"},
    "torchvision": {"model/backbone"},
    "scipy": {"model/matcher", "ablation/statistics", "data/matfile"},
    "PIL": {"data/images"},
    "pycocotools": {"data/masks", "evaluate/instance"},
    "cv2": {"draw", "lettering", "data/*", "evaluate/instance"},
    "matplotlib": {"draw", "lettering"},
    "pydantic": {"config/*", "ablation/spec", "ablation/studyfile", "ablation/cost"},
    "yaml": {"config/identity", "config/yamlfile"},
    "safetensors": {"model/*", "train/checkpoint"},
    "onnx": {"model/export_onnx"},
    "onnxscript": {"model/export_onnx"},
    "onnxruntime": {"model/export_onnx"},
    "psutil": {"cli/doctor"},
    "rich": {"cli/live"},
}
"""The only files that may import a third party."""

TORCH_FREE = {
    *("types", "atomic", "cores", "home", "shell", "plugin", "__main__", "__init__", "capacity"),
    *("config/*", "tracking/*", "cli/*"),
    *(f"model/weights/{name}" for name in ("catalogue", "fetching", "hub", "named")),
    *(f"ablation/{name}" for name in ("spec", "studyfile", "plan", "cost", "search", "makespan")),
}
"""Files, or folders, that load torch and ray, if at all, inside a function."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "mpformer").with_suffix("").as_posix()


def is_among(name: str, places: set[str]) -> bool:
    """Whether a file is one of these, or lies in one of these folders ('config/*')."""
    return name in places or f"{name.split('/')[0]}/*" in places


def imports(path: Path, *, at_import_time: bool = False) -> list[str]:
    """What a file imports, `if TYPE_CHECKING` left out; with `at_import_time`, functions left out, too."""
    tree = ast.parse(path.read_text(), path)
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def part_of(module: str) -> str:
    """The part of mpformer that a dotted name lies in: 'mpformer.model.noise.x' -> 'model'."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in ALLOWED else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    own = name_of(path).split("/")[0]
    used = {part_of(module) for module in imports(path) if module.split(".")[0] == "mpformer"}
    assert own in ALLOWED, f"mpformer/{own}: a new part needs its place in the order"
    # `from mpformer import __version__`, or a module of the package, which part_of has named
    assert used - {own, "__init__"} <= ALLOWED[own]


def module_file(dotted: str) -> Path | None:
    """The file of mpformer that a dotted name lies in: a module, or a package's `__init__`."""
    names = dotted.split(".")
    for end in range(len(names), 0, -1):
        base = ROOT.joinpath(*names[:end])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {
        path: {
            found
            for module in imports(path)
            if module.split(".")[0] == "mpformer" and (found := module_file(module)) not in (None, path)
        }
        for path in SOURCES
    }
    while graph:
        free = {path for path, used in graph.items() if not used & graph.keys()}
        assert free, "a circle among " + ", ".join(sorted(name_of(path) for path in graph))
        graph = {path: used for path, used in graph.items() if path not in free}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_third_parties_stay_inside_their_fences(path):
    name = name_of(path)
    for module in imports(path):
        allowed = FENCES.get(module.split(".")[0])
        assert allowed is None or is_among(name, allowed), f"{module} does not belong here"


@pytest.mark.parametrize("path", [p for p in SOURCES if is_among(name_of(p), TORCH_FREE)], ids=name_of)
def test_light_modules_name_no_heavy_one_at_the_top(path):
    heavy = {"torch", "ray", "mlflow", "matplotlib", "timm", "scipy", "cv2", "torchvision", "onnxruntime"}
    assert not heavy & {module.split(".")[0] for module in imports(path, at_import_time=True)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long_to_be_read(path):
    assert len(path.read_text().splitlines()) <= 500


def loaded_after(code: str, cwd: Path) -> set[str]:
    """Top-level modules in a fresh process once `code` has run."""
    script = f"import sys\n{code}\nprint('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


RECIPE = ROOT / "experiments/recipes/synthetic-panoptic-tiny.yaml"
STUDY = ROOT / "experiments/quickstart.yaml"


@pytest.mark.parametrize(
    "code",
    [
        "import mpformer",
        "from mpformer.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        pytest.param(
            f"from mpformer.cli.main import main\nassert main(['show', {str(RECIPE)!r}]) == 0",
            marks=pytest.mark.slow,
        ),
        f"from mpformer.cli.main import main\nassert main(['show', {str(RECIPE)!r}, {str(RECIPE)!r}]) == 0",
        f"from mpformer.cli.main import main\nassert main(['ablate', {str(STUDY)!r}, '--plan']) == 0",
        "from mpformer.cli.main import main\nassert main(['weights', 'list']) == 0",
        f"from mpformer.cli.main import main\nassert main(['train', {str(RECIPE)!r}, 'train.lrr=1']) == 2",
    ],
    ids=["import", "help", "show", "show two", "plan", "weights list", "wrong setting"],
)
def test_what_only_talks_loads_neither_torch_nor_ray(code, tmp_path):
    heavy = {"torch", "ray", "mlflow", "matplotlib", "timm", "scipy", "cv2", "numpy"}
    assert not heavy & loaded_after(code, tmp_path)


def test_idle_threads_do_not_spin(tmp_path):
    # OpenMP reads it when torch is loaded, so the command line sets it before any command does that
    code = """
import os
os.environ.pop("OMP_WAIT_POLICY", None)  # conftest.py has set it
from mpformer.cli.main import main
main(["train", "nothing"])
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""
    assert "torch" not in loaded_after(code, tmp_path)


@pytest.mark.slow
def test_what_starts_runs_does_not_load_what_builds_models(tmp_path):
    # Ray's controllers, and the trials of a study, import this, too: it decides how long a run takes to begin
    heavy = {"timm", "torchvision", "sympy", "mlflow", "matplotlib", "tensorboardX"}
    assert not heavy & loaded_after("import mpformer.ablation.tune", tmp_path)


@pytest.mark.slow
def test_a_training_step_needs_neither_ray_nor_mlflow_nor_a_data_set(tmp_path):
    code = """
import torch
from mpformer.config import load_config
from mpformer.model.architecture import build_model
from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from mpformer.types import Batch, Target
config = load_config(RECIPE, ["data.augment.size=[64, 64]", "model.loss.points=64", "model.pilot.queries=8"])
model = build_model(config.model, 3)
masks = torch.zeros(2, 64, 64, dtype=torch.bool)
masks[0, 8:40, 8:40] = masks[1, 30:60, 20:50] = True
batch = Batch(
    torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8),
    (Target(torch.tensor([0, 2]), masks),), ((64, 64),), ("a",), (0,),
)
before = [p.detach().clone() for p in model.parameters()]
result = train_step(
    model, build_optimizer(model, config.train), batch, config, Timers(), classes=3, autocast=False
)
assert torch.isfinite(result.total)
assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
"""
    loaded = loaded_after(f"RECIPE = {str(RECIPE)!r}\n{code}", tmp_path)
    assert "torch" in loaded
    assert not {"ray", "mlflow"} & loaded
