"""The CUDA kernels without a GPU: NVRTC compiles them, an emulation of warps runs them against loops."""

import pytest
import torch

from mpformer.ops import build, nvrtc
from mpformer.ops.cuda import CudaKernel, Variant, lanes_of
from mpformer.ops.reference import sampling_from_logits
from tests.ops.emulated import Emulated
from tests.ops.test_deform_attn import ODD, assert_near, exact, exact_fused, problem, same

pytestmark = pytest.mark.slow

SOURCE = build.SOURCES / "deform_attn.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# ---- NVRTC


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize(
    ("value", "point", "channels", "fused"),
    [
        (0, 0, 32, 1),
        pytest.param(0, 0, 32, 0, marks=pytest.mark.slow),
        pytest.param(1, 0, 32, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 5, 1, marks=pytest.mark.slow),
    ],
)
def test_compiles(compiler, monkeypatch, tmp_path, architecture, value, point, channels, fused):
    """To machine code, without headers; kernels that add to memory exist from sm_90 on."""
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path))
    variant = Variant(value, point, value, channels, 3, 4, fused, *lanes_of(channels, 2 if value else 4))
    code = nvrtc.compile_source(SOURCE.read_text(), architecture, variant.defines())
    assert code[:4] == b"\x7fELF"
    for kernel in (b"deform_attn_forward", b"deform_attn_backward_record", b"deform_attn_backward_value"):
        assert kernel in code
    assert (b"deform_attn_backward_add" in code) == (architecture >= 90)


def test_a_gpu_newer_than_nvrtc_gets_ptx_and_an_old_one_a_reason(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path))
    variant = Variant(0, 0, 0, 32, 3, 4, 1, *lanes_of(32, 4))
    assert b".target sm_" in nvrtc.compile_source(SOURCE.read_text(), 990, variant.defines())
    with pytest.raises(nvrtc.CudaError, match="does not compile for sm_30"):
        nvrtc.compile_source(SOURCE.read_text(), 30, variant.defines())


def test_compiled_code_is_kept_and_errors_are_quoted(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path))
    source = 'extern "C" __global__ void k(float* x) { x[0] = N; }'
    first = nvrtc.compile_source(source, 90, [("N", 1)])
    (kept,) = tmp_path.glob("cuda/*.bin")
    kept.write_bytes(b"from the cache")
    assert nvrtc.compile_source(source, 90, [("N", 1)]) == b"from the cache"
    assert nvrtc.compile_source(source, 90, [("N", 2)])[:4] == first[:4] == b"\x7fELF"
    with pytest.raises(nvrtc.CudaError, match=r'deform_attn\.cu\(1\): error: identifier "M" is undefined'):
        nvrtc.compile_source(source, 90, [("N", "M")])
    with pytest.raises(nvrtc.CudaError, match=r"other\.cu\(1\): error"):
        nvrtc.compile_source(source, 90, [("N", "M")], "other.cu")


def test_code_is_compiled_again_when_a_header_has_changed(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    source = '#include "n.h"\nextern "C" __global__ void k(float* x) { x[0] = N; }'
    codes = []
    for number in (1, 2):
        (tmp_path / "n.h").write_text(f"constexpr float N = {number};\n")
        codes.append(nvrtc.compile_source(source, 90, []))
    assert codes[0] != codes[1]
    assert len(list(tmp_path.glob("cache/cuda/*.bin"))) == 2


# ---- emulation

KERNELS = [f"deform_attn_{name}" for name in ("forward", "backward_add", "backward_record", "backward_value")]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """Makes the operator for an architecture, on CPU tensors."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("emulation")

    def load(variant):
        return Emulated(SOURCE, KERNELS, variant.defines(), folder)

    return lambda architecture: CudaKernel(architecture, load, pytest.fail)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


SHAPES = ((3, 4), (5, 1), (6, 7))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("channels", "points", "dtype", "fused"),
    [
        (32, 4, torch.float32, True),
        (32, 4, torch.bfloat16, True),
        pytest.param(32, 4, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(24, 3, torch.float16, True, marks=pytest.mark.slow),
        pytest.param(5, 4, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(144, 1, torch.float32, True, marks=pytest.mark.slow),
        pytest.param(2, 7, torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_emulated_kernels_are_the_formula(emulation, channels, points, dtype, fused, architecture):
    """Vector additions (90) and sorted collection (80); several warps, a last one that is not full."""
    kernel = emulation(architecture)
    size = {"batch": 2, "queries": 19, "heads": 3, "channels": channels, "points": points}
    value, reference, points, weights, grad = problem(SHAPES, **size, dtype=dtype)
    reference = problem(SHAPES, **size, dtype=torch.float32)[1]
    if fused:
        expected = exact_fused(value, SHAPES, reference, points, weights, grad)
    else:
        points, weights = sampling_from_logits(SHAPES, reference, points, weights)
        weights, reference = weights.to(dtype), None
        expected = exact(value, SHAPES, points, weights, grad)
    got = [
        kernel.forward(value, SHAPES, reference, points, weights),
        *kernel.backward(grad, value, SHAPES, reference, points, weights),
    ]
    assert [g.dtype for g in got] == [dtype, dtype, points.dtype, weights.dtype]
    for name, g, e in zip(("output", "value", "points", "weights"), got, expected):
        assert_near(name, g, e, TOLERANCE[dtype])


def test_determinism_selects_the_sorted_form(emulation, deterministic, monkeypatch):
    """One shared reference, unaligned and transposed inputs; both forms agree."""
    launched = []
    run = Emulated.launch
    monkeypatch.setattr(
        Emulated, "launch", lambda self, name, *rest: (launched.append(name), run(self, name, *rest))
    )
    value, reference, offsets, logits, grad = problem(
        SHAPES, batch=2, queries=9, channels=8, points=4, dtype=torch.float32
    )
    value = torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)
    offsets = offsets.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for wanted in (False, True):
        deterministic(wanted)
        results.append(emulation(90).backward(grad, value, SHAPES, reference[:1], offsets, logits))
    assert launched == [f"deform_attn_backward_{name}" for name in ("add", "record", "value")]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    expected = exact_fused(value, SHAPES, reference[:1].expand(2, -1, -1, -1), offsets, logits, grad)
    for g, e in zip(results[1], expected[1:]):
        assert_near("gradient", g, e, 2e-5)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("odd", ODD)
def test_emulated_kernels_and_what_is_not_a_number(emulation, odd, architecture):
    """As the CPU kernel: in a location (plain), in an offset (fused), in the values."""
    kernel = emulation(architecture)
    value, reference, offsets, logits, grad = problem(
        SHAPES, queries=19, heads=3, channels=32, points=4, seed=3, dtype=torch.float32
    )
    locations, weights = sampling_from_logits(SHAPES, reference, offsets, logits)
    for points in (locations, offsets):
        points[0, 3, 1, 0, 1, 0] = odd
        points[0, 7, 0, 1, 0, 1] = odd
    for got, expected in (
        (
            [
                kernel.forward(value, SHAPES, None, locations, weights),
                *kernel.backward(grad, value, SHAPES, None, locations, weights),
            ],
            exact(value, SHAPES, locations, weights, grad),
        ),
        (
            [
                kernel.forward(value, SHAPES, reference, offsets, logits),
                *kernel.backward(grad, value, SHAPES, reference, offsets, logits),
            ],
            exact_fused(value, SHAPES, reference, offsets, logits, grad),
        ),
    ):
        for g, e in zip(got, expected):
            same(g, e)
    value[0, 5, 1, 2] = odd
    same(
        kernel.forward(value, SHAPES, None, locations, weights),
        exact(value, SHAPES, locations, weights, grad)[0],
    )
