"""The model beside a torchvision whose compiled library loads, and beside one whose does not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpformer.ops.build import BuildError, find_compiler

pytestmark = pytest.mark.slow  # processes that import torch and timm, and a build against its headers

PACKAGE = Path(importlib.util.find_spec("torchvision").origin).parent

# What torchvision's Python part asks of its library on import; the arguments do not matter there.
LIBRARY = """
#include <torch/library.h>
static int64_t cuda_version() { return -1; }
TORCH_LIBRARY_FRAGMENT(torchvision, m) {
  m.def("_cuda_version", &cuda_version);
  for (std::string name : {"nms", "qnms"})
    m.def((name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor").c_str());
  for (std::string name : {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"})
    for (std::string form : {name, "_" + name + "_backward"})
      m.def((form + "(Tensor input) -> Tensor").c_str());
  m.def("qroi_align(Tensor input) -> Tensor");
}
"""

USE = """
import torch
torch.version.cuda = {cuda!r}
import mpformer.model.backbone
import torchvision
from mpformer.config.model import Backbone
model = mpformer.model.backbone.Backbone(Backbone(name="resnet18", pretrained=None))
print(torchvision.__file__, torchvision.extension._has_ops(), len(model(torch.zeros(1, 3, 32, 32))))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library that registers torchvision's operators, built against the torch that is installed."""
    if sys.platform != "linux":
        pytest.skip("the flags of its build are Linux's")
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    folder, torch_folder = tmp_path_factory.mktemp("library"), Path(torch.__file__).parent
    (folder / "library.cpp").write_text(LIBRARY)
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_folder / 'include'}"]
    linked = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    built = folder / "_C.so"
    command = [*compiler, *flags, str(folder / "library.cpp"), *linked, "-o", str(built)]
    subprocess.run(command, check=True)
    return built.read_bytes()


def use(folder: Path, library: bytes | None, cuda: str | None) -> list[str]:
    """In a process of its own: torchvision's path, whether it has its operators, and the number of maps."""
    (folder / "torchvision").mkdir()
    for part in PACKAGE.iterdir():
        if not part.name.startswith("_C."):
            (folder / "torchvision" / part.name).symlink_to(part)
    if library is not None:
        (folder / "torchvision" / "_C.so").write_bytes(library)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", USE.format(cuda=cuda)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.split()


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_library_that_loads_keeps_its_operators(library, tmp_path, cuda):
    # torch without CUDA beside such a library: macOS, ROCm, and PyTorch's CPU wheels of both
    found = use(tmp_path, library, cuda)
    assert found == [str(tmp_path / "torchvision" / "__init__.py"), "True", "4"]


@pytest.mark.parametrize(
    ("broken", "cuda"),
    [(b"built for another torch", None), (b"built for another torch", "13.0"), (None, None)],
)
def test_a_library_that_does_not_load_is_done_without(tmp_path, broken, cuda):
    assert use(tmp_path, broken, cuda)[1:] == ["False", "4"]
