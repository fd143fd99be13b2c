"""The operator as torch sees it, and the bits of the CPU kernel: registration, autocast, threads, errors."""

import pytest
import torch

from mpformer.ops import build, cpu, kernel_status, ms_deform_attn, ms_deform_attn_fused
from mpformer.ops.cpu import Library
from mpformer.ops.reference import sampling_from_logits
from tests.ops.test_deform_attn import assert_near, exact_fused, problem, run

SHAPES = ((3, 4), (6, 8), (5, 1))
FLAT = [3, 4, 6, 8, 5, 1]


def operator_arguments(fused: bool, dtype=torch.float32):
    value, reference, offsets, logits, _ = problem(SHAPES, batch=2, queries=9, channels=6, dtype=dtype)
    if not fused:
        offsets, logits = sampling_from_logits(SHAPES, reference, offsets, logits)
    leaves = [t.detach().requires_grad_() for t in (value, reference, offsets, logits)]
    return leaves[0], FLAT, leaves[1] if fused else None, leaves[2], leaves[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(fused, dtype):
    results = torch.library.opcheck(
        torch.ops.mpformer.ms_deform_attn.default, operator_arguments(fused, dtype)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compile_sees_one_node(fused, autocast):
    """fullgraph: no break; the graph holds our operator once and nothing that belongs to its inside."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def function(value, reference, points, weights):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if fused:
                return ms_deform_attn_fused(value, SHAPES, reference, points, weights)
            return ms_deform_attn(value, SHAPES, points, weights)

    value, _, reference, points, weights = operator_arguments(fused)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    got = compiled(value, reference, points, weights)
    torch.testing.assert_close(got, function(value, reference, points, weights))
    got.sum().backward()
    assert [name for name in seen if "autocast" not in name] == ["mpformer.ms_deform_attn.default"]


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_casts_the_values_only(fused):
    """The output takes the autocast dtype, gradients the dtypes of their inputs, locations keep float32."""
    value, _, reference, points, weights = operator_arguments(fused)
    with torch.autocast("cpu", torch.bfloat16):
        if fused:
            got = ms_deform_attn_fused(value, SHAPES, reference, points, weights)
            wanted = ms_deform_attn_fused(value.bfloat16(), SHAPES, reference, points, weights)
        else:
            got = ms_deform_attn(value, SHAPES, points, weights)
            wanted = ms_deform_attn(value.bfloat16(), SHAPES, points, weights)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)
    got.float().sum().backward()
    assert value.grad.dtype == points.grad.dtype == weights.grad.dtype == torch.float32


def test_shapes_as_a_tensor():
    value, _, _, points, weights = operator_arguments(False)
    got = ms_deform_attn(value, torch.tensor(SHAPES), points, weights)
    assert torch.equal(got, ms_deform_attn(value, SHAPES, points, weights))


def test_errors_name_what_does_not_fit():
    value, _, reference, points, weights = operator_arguments(True)
    with pytest.raises(ValueError, match=r"value has 65 rows, spatial_shapes give 64"):
        ms_deform_attn(value, ((3, 4), (6, 8), (2, 2)), points, weights)
    with pytest.raises(ValueError, match=r"must be 3 pairs"):
        ms_deform_attn(value, SHAPES[:2], points, weights)
    with pytest.raises(ValueError, match=r"must be 3 pairs \(H, W\) of at least 1"):
        ms_deform_attn(value, ((3, 4), (6, 8), (0, 1)), points, weights)
    with pytest.raises(ValueError, match=r"sampling_locations must be"):
        ms_deform_attn(value, SHAPES, points[..., :1], weights)
    with pytest.raises(ValueError, match=r"2 images and 2 heads, attention_weights 1 and 2"):
        ms_deform_attn(value, SHAPES, points[:1], weights[:1])
    with pytest.raises(ValueError, match=r"reference_points must be \[2 or 1, 9, 3, 2\]"):
        ms_deform_attn_fused(value, SHAPES, reference[:, :-1], points, weights)
    with pytest.raises(TypeError, match=r"torch.int64"):
        ms_deform_attn(value.detach().long(), SHAPES, points, weights)


# ---- the bits of the CPU kernel


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("pool", ["torch", "own"])
@pytest.mark.parametrize("fused", [False, True])
def test_same_bits_for_every_number_of_threads(library: Library, threads, monkeypatch, fused, pool):
    """Large enough for many tasks; twice each, on torch's thread pool and on threads of our own."""
    shapes = ((9, 7), (17, 14), (33, 28))
    queries = sum(h * w for h, w in shapes)
    value, reference, points, weights, grad = problem(
        shapes, batch=2, queries=2 * queries, heads=3, channels=20, points=4, dtype=torch.float32
    )
    if pool == "own":
        monkeypatch.setattr(cpu, "torch_threads", lambda: None)
    elif cpu.torch_threads() is None:
        pytest.skip("the OpenMP runtime of torch was not found")
    if not fused:
        points, weights = sampling_from_logits(shapes, reference, points, weights)
        reference = None
    for kernel in library.usable:
        wanted = None
        for count in (1, 2, 3, 5, 16, 1, 2):
            threads(count)
            got = [
                library.forward(value, shapes, reference, points, weights, kernel),
                *library.backward(grad, value, shapes, reference, points, weights, kernel),
            ]
            wanted = wanted or got
            assert all(torch.equal(g, w) for g, w in zip(got, wanted)), (kernel, count)


@pytest.mark.slow
def test_vectors_as_long_as_those_of_avx512(tmp_path, monkeypatch, library: Library):
    """The source with 16 floats per vector, as for AVX-512, in AVX2 instructions."""
    if "avx2" not in library.usable:
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(build, "_X86", build._X86[:1])
    monkeypatch.setattr(build.platform, "machine", lambda: "other")
    monkeypatch.setattr(build, "_PLAIN", [("kernel_plain", 16, ["-mavx2", "-mfma"])])
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in build._FILES:  # the table of kernels without its x86 entries
        text = (build.SOURCES / name).read_text().replace("__x86_64__", "NOT_HERE")
        (sources / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", sources)
    build.compile_library(tmp_path / "wide.so")
    wide = Library(str(tmp_path / "wide.so"), build.source_hash())
    assert wide.kernels == ["plain"]
    for channels in (5, 16, 24, 32, 50, 70):
        tensors = problem(SHAPES, batch=2, queries=37, channels=channels, dtype=torch.float32)
        value, reference, offsets, logits, grad = tensors
        got = [
            wide.forward(value, SHAPES, reference, offsets, logits),
            *wide.backward(grad, value, SHAPES, reference, offsets, logits),
        ]
        expected = exact_fused(value, SHAPES, reference, offsets, logits, grad)
        for name, g, e in zip(("output", "value", "offsets", "logits"), got, expected):
            assert_near(name, g, e, 2e-5)


def test_half_types_round_as_torch_does(library: Library):
    """One query at every cell centre copies the map: all 65,536 bit patterns come out as they went in."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    centres = (torch.stack([columns, rows], -1).reshape(1, -1, 1, 1, 1, 2) + 0.5) / 256
    ones = torch.ones(1, 65536, 1, 1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        finite = patterns.view(dtype).isfinite()
        value = torch.where(finite, patterns.view(dtype), 0).view(1, -1, 1, 1)
        got = library.forward(value, ((256, 256),), None, centres, ones)
        assert torch.equal(got.flatten(), value.flatten())
        # Products that need rounding: half of every value, doubled weights that overflow.
        for weight in (1 / 3, 1.001, 3.0):
            got = library.forward(value, ((256, 256),), None, centres, ones * weight)
            wanted = (value.float() * torch.tensor(weight)).to(dtype)
            assert torch.equal(got.flatten(), wanted.flatten()), (dtype, weight)


def test_status_names_the_kernel(library: Library):
    status = {s.device: s for s in kernel_status()}
    assert status["cpu"].compiled
    assert status["cpu"].kernel == library.usable[-1]
    assert status["cpu"].advice is None
    assert "built" in status["cpu"].reason


def test_gradients_flow_only_where_wanted():
    """A frozen value or frozen points change nothing for the others."""
    value, reference, offsets, logits, grad = problem(SHAPES, dtype=torch.float32)
    every = run(
        lambda v, o, w: ms_deform_attn_fused(v, SHAPES, reference, o, w), value, offsets, logits, grad
    )
    some = run(lambda o: ms_deform_attn_fused(value, SHAPES, reference, o, logits), offsets, grad)
    assert torch.equal(every[2], some[1])
