"""The CPU kernel for arm64: cross-compiled, run under emulation, compared with the reference."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from mpformer.ops import build
from mpformer.ops.reference import ms_deform_attn_reference, ms_deform_attn_reference_backward

pytestmark = pytest.mark.slow

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
SHAPES = ((7, 9), (4, 5), (1, 1))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The library and a program around it, built for arm64 by the package's own build."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    folder = tmp_path_factory.mktemp("arm64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        build.compile_library(folder / "library.so")
    source = str(build.SOURCES.parents[2] / "tests/ops/arm64.cpp")
    flags = ["-std=c++17", f"-I{build.SOURCES}", source, str(folder / "library.so"), f"-Wl,-rpath,{folder}"]
    subprocess.run([COMPILER, *flags, "-o", str(folder / "arm64")], check=True)
    return folder / "arm64"


def run(program, value, locations, weights, grad):
    """Output and the three gradients, from the emulated kernel."""
    batch, cells, heads, channels = value.shape
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[value.dtype]
    sizes = (batch, cells, weights.shape[1], heads, channels, *weights.shape[3:], kind)
    numbers = np.array([*sizes, *(side for shape in SHAPES for side in shape)], np.int64)
    given, found = program.with_name("in.bin"), program.with_name("out.bin")
    tensors = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (value, grad, locations, weights)]
    given.write_bytes(b"".join([numbers.tobytes(), *tensors]))
    subprocess.run([EMULATOR, "-L", SYSTEM, str(program), str(given), str(found)], check=True, timeout=100)
    left, results = bytearray(found.read_bytes()), []
    for like in (grad, value, locations, weights):
        count = like.numel() * like.element_size()
        results.append(torch.frombuffer(left[:count], dtype=like.dtype).view(like.shape))
        left = left[count:]
    assert not left
    return results


@pytest.mark.parametrize(
    ("dtype", "channels", "tolerance"),
    [
        (torch.float32, 32, 1e-5),
        (torch.float32, 5, 1e-5),
        (torch.bfloat16, 32, 2e-2),
        (torch.float16, 8, 2e-3),
    ],
)
def test_forward_and_backward_equal_the_reference(program, dtype, channels, tolerance):
    torch.manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, cells, 3, channels).to(dtype)
    locations = torch.rand(2, 37, 3, len(SHAPES), 4, 2) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, 37, 3, len(SHAPES), 4).flatten(-2).softmax(-1).view(2, 37, 3, len(SHAPES), 4)
    grad = torch.randn(2, 37, 3 * channels).to(dtype)
    output, *grads = run(program, value, locations, weights, grad)
    expected = ms_deform_attn_reference(value, SHAPES, locations, weights)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    expected_grads = ms_deform_attn_reference_backward(grad, value, SHAPES, locations, weights)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=10 * tolerance, rtol=tolerance)


def test_what_is_not_finite_propagates(program):
    value = torch.ones(1, 84, 1, 4)
    value[0, 0] = torch.nan
    locations = torch.full((1, 2, 1, 3, 1, 2), 0.5)
    locations[0, 0, 0, 0] = 0.0  # touches the cell
    locations[0, 1, 0, 1, 0, 0] = torch.inf
    weights = torch.full((1, 2, 1, 3, 1), 1 / 3)
    output = run(program, value, locations, weights, torch.ones(1, 2, 4))[0]
    assert output.isnan().all()
    locations[0, 0, 0, 0], locations[0, 1, 0, 1] = 0.5, 1e30  # finite and far outside: zero
    output = run(program, value, locations, weights, torch.ones(1, 2, 4))[0]
    torch.testing.assert_close(output[0, :, 0], torch.tensor([1.0, 2 / 3]))
