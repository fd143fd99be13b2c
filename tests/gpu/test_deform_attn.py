"""The operator on a GPU: numbers against float64, both forms of the backward pass, memory, streams."""

import pytest
import torch

from mpformer.ops import kernel_status, ms_deform_attn, ms_deform_attn_fused
from mpformer.ops.reference import sampling_from_logits
from tests.ops.test_deform_attn import ODD, exact, exact_fused, problem, run, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# What must hold on a GPU: relative error in the Euclidean norm against float64.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DECODER = ((16, 16), (32, 32), (64, 64))  # the pixel decoder's levels at 512 x 512


@pytest.fixture(autouse=True)
def compiled():
    """All of this file is about the compiled kernels: the reference passing would prove nothing."""
    status = {s.device: s for s in kernel_status()}["cuda"]
    if not status.compiled:
        pytest.skip(f"no compiled CUDA kernel: {status.reason}")


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


def error(got, expected) -> float:
    got, expected = got.detach().double().cpu(), torch.as_tensor(expected).double().cpu()
    return ((got - expected.view(got.shape)).norm() / expected.norm()).item()


@pytest.mark.parametrize("sorted_form", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "points", "heads"), [(32, 4, 8), (24, 4, 2), (5, 3, 1), (144, 2, 1), (2, 7, 3), (1, 1, 1)]
)
def test_formula(channels, points, heads, dtype, fused, sorted_form, deterministic):
    """Small shapes against loops in float64: output and all gradients."""
    deterministic(sorted_form)
    shapes = ((3, 4), (5, 1), (6, 7))
    size = {"batch": 2, "queries": 19, "heads": heads, "channels": channels, "points": points}
    value, reference, given, weights, grad = problem(shapes, **size, dtype=dtype)
    reference = problem(shapes, **size, dtype=torch.float32)[1]
    if fused:
        expected = exact_fused(value, shapes, reference, given, weights, grad)
        got = run(
            lambda v, x, w: ms_deform_attn_fused(v, shapes, reference.cuda(), x, w),
            *on_gpu(value, given, weights, grad),
        )
    else:
        given, weights = sampling_from_logits(shapes, reference, given, weights)
        weights = weights.to(dtype)
        expected = exact(value, shapes, given, weights, grad)
        got = run(lambda v, x, w: ms_deform_attn(v, shapes, x, w), *on_gpu(value, given, weights, grad))
    for name, g, e in zip(("output", "value", "points", "weights"), got, expected):
        assert error(g, e) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("sorted_form", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pixel_decoder_s_shapes(dtype, sorted_form, deterministic):
    """Batch 2 at 512 x 512 against the reference in float64, computed on the GPU."""
    queries = sum(h * w for h, w in DECODER)
    size = {"batch": 2, "queries": queries, "heads": 8, "channels": 32, "points": 4}
    value, _, offsets, logits, grad = on_gpu(*problem(DECODER, **size, dtype=dtype))
    reference = problem(DECODER, **size, dtype=torch.float32)[1].cuda()
    wide = [t.double() for t in (value, offsets, logits, grad)]
    deterministic(False)  # the float64 reference has no deterministic form
    expected = run(lambda v, x, w: ms_deform_attn_fused(v, DECODER, reference.double(), x, w), *wide)
    deterministic(sorted_form)
    got = run(lambda v, x, w: ms_deform_attn_fused(v, DECODER, reference, x, w), value, offsets, logits, grad)
    for g, e in zip(got, expected):
        assert error(g, e) <= TOLERANCE[dtype]


def test_the_deterministic_form_gives_the_same_bits(deterministic):
    deterministic(True)
    value, reference, offsets, logits, grad = on_gpu(
        *problem(DECODER, queries=4000, heads=8, channels=32, points=4, dtype=torch.float32)
    )
    offsets = offsets * 0.1  # crowded cells
    runs = [
        run(lambda v, x, w: ms_deform_attn_fused(v, DECODER, reference, x, w), value, offsets, logits, grad)
        for _ in range(5)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("odd", ODD)
def test_not_a_number(odd):
    shapes = ((3, 4), (2, 2))
    value, reference, offsets, logits, grad = problem(
        shapes, queries=40, channels=32, points=4, seed=3, dtype=torch.float32
    )
    offsets[0, 3, 1, 0, 1, 0] = odd
    offsets[0, 7, 0, 1, 0, 1] = odd
    got = run(
        lambda v, o, w: ms_deform_attn_fused(v, shapes, reference.cuda(), o, w),
        *on_gpu(value, offsets, logits, grad),
    )
    for g, e in zip(got, exact_fused(value, shapes, reference, offsets, logits, grad)):
        same(g.cpu(), e)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_to_do(batch, queries):
    shapes = ((3, 4),)
    value, reference, offsets, logits, grad = on_gpu(
        *problem(shapes, batch=batch, queries=queries, dtype=torch.float32)
    )
    got = run(lambda v, x, w: ms_deform_attn_fused(v, shapes, reference, x, w), value, offsets, logits, grad)
    assert got[0].shape == (batch, queries, 8)
    assert all(torch.isfinite(g).all() for g in got)


def test_streams_and_autocast():
    """On a side stream, after work there that its input depends on; bf16 under autocast."""
    shapes = ((16, 16),)
    value, reference, offsets, logits, _ = on_gpu(
        *problem(shapes, queries=64, channels=32, dtype=torch.float32)
    )
    wanted = ms_deform_attn_fused((value * 2).bfloat16(), shapes, reference, offsets, logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        torch.cuda._sleep(20_000_000)
        got = ms_deform_attn_fused(value * 2, shapes, reference, offsets, logits)
    stream.synchronize()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


def test_compiled_graph_and_cuda_graph():
    shapes = ((16, 16), (8, 8))
    value, reference, offsets, logits, _ = on_gpu(
        *problem(shapes, queries=64, channels=32, dtype=torch.float32)
    )

    def function(v, x, w):
        return ms_deform_attn_fused(v, shapes, reference, x, w) * 2

    wanted = function(value, offsets, logits)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(value, offsets, logits), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(value, offsets, logits)
    got.zero_()
    graph.replay()
    torch.testing.assert_close(got, wanted)


def test_memory(deterministic):
    """Forward: the output alone. Backward by addition: gradients and one float copy of the value's."""
    queries = sum(h * w for h, w in DECODER)
    size = {"queries": queries, "heads": 8, "channels": 32, "points": 4}
    value, reference, offsets, logits, grad = on_gpu(*problem(DECODER, **size, dtype=torch.float32))
    deterministic(False)
    for t in (value, offsets, logits):
        t.requires_grad_()
    one = value.numel() * 4
    ms_deform_attn_fused(value, DECODER, reference, offsets, logits).backward(grad)
    value.grad = offsets.grad = logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = ms_deform_attn_fused(value, DECODER, reference, offsets, logits)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * one
    output.backward(grad)
    gradients = 2 * one + (offsets.numel() + logits.numel()) * 4
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * (one + gradients)
