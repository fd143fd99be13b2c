"""The operator against float64 loops: values, all gradients, borders, and what is not a number."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpformer.ops import ms_deform_attn, ms_deform_attn_fused
from mpformer.ops.cpu import Library
from mpformer.ops.reference import (
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
    sampling_from_logits,
)
from tests.ops.exact import forward_and_gradients, fused_forward_and_gradients

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

sizes = st.fixed_dictionaries(
    {
        "shapes": st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4).map(
            tuple
        ),
        "batch": st.integers(0, 3),
        "queries": st.sampled_from([0, 1, 2, 7, 31, 32, 33, 40]),
        "heads": st.integers(1, 3),
        "channels": st.sampled_from([1, 2, 3, 5, 8, 12, 16, 24, 31, 32, 33, 40, 64, 70]),
        "points": st.integers(1, 5),
        "seed": st.integers(0, 2**32 - 1),
    }
)
not_empty = sizes.filter(lambda size: size["batch"] and size["queries"])
properties = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def problem(shapes, batch=1, queries=3, heads=2, channels=4, points=2, seed=0, dtype=torch.float64):
    """value, reference points, offsets, logits and an output gradient, in `dtype`.

    Sampling positions keep 2 % of a cell away from cell borders, where the gradient of a location jumps and
    rounding decides on which side; some lie outside the maps.
    """
    make = torch.Generator().manual_seed(seed)
    levels, rows = len(shapes), sum(h * w for h, w in shapes)
    value = torch.randn(batch, rows, heads, channels, generator=make, dtype=torch.float64)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)
    # Reference points and offsets whose sum is exact enough in every dtype: multiples of 1/8 of a cell apart.
    reference_cell = (
        torch.rand(batch, queries, levels, 2, generator=make, dtype=torch.float64) * size
    ).floor()
    reference = (reference_cell + 0.5) / size
    steps = torch.randint(-24, 24, (batch, queries, heads, levels, points, 2), generator=make)
    offsets = steps.double() / 8 + 1 / 16
    logits = torch.randn(batch, queries, heads, levels, points, generator=make, dtype=torch.float64) * 2
    grad = torch.randn(batch, queries, heads * channels, generator=make, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (value, reference, offsets, logits, grad))


def exact(value, shapes, locations, weights, grad):
    split = grad.unflatten(-1, value.shape[2:])
    inputs = [t.detach().double().numpy() for t in (value, locations, weights, split)]
    return forward_and_gradients(inputs[0], shapes, *inputs[1:])


def exact_fused(value, shapes, reference, offsets, logits, grad):
    split = grad.unflatten(-1, value.shape[2:])
    inputs = [t.detach().double().numpy() for t in (value, reference, offsets, logits, split)]
    return fused_forward_and_gradients(inputs[0], shapes, *inputs[1:])


def assert_near(name: str, got: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Relative error in the Euclidean norm over the whole tensor, and nothing wildly off in one place."""
    got, expected = got.detach().double().numpy().reshape(expected.shape), expected
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(got - expected) <= tolerance * norm + 1e-30, name
    if expected.size:
        assert np.abs(got - expected).max() <= 4 * tolerance * np.abs(expected).max() + 1e-30, name


def run(function, *tensors: Tensor) -> list[Tensor]:
    """Output and gradients; the last tensor is the gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:-1]]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, tensors[-1])]


@properties
@given(sizes)
def test_reference_is_the_formula(size):
    shapes = size["shapes"]
    value, reference, offsets, logits, grad = problem(**size)
    locations, weights = sampling_from_logits(shapes, reference, offsets, logits)
    got = run(lambda v, x, w: ms_deform_attn_reference(v, shapes, x, w), value, locations, weights, grad)
    written = ms_deform_attn_reference_backward(grad, value, shapes, locations, weights)
    for name, g, e in zip(
        ("output", "value", "locations", "weights"), got, exact(value, shapes, locations, weights, grad)
    ):
        assert_near(name, g, e, 1e-11)
    for automatic, by_hand in zip(got[1:], written):
        torch.testing.assert_close(by_hand, automatic)


@properties
@given(
    size=not_empty,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    index=st.integers(0, 9),
)
def test_kernels_are_the_formula(library: Library, size, dtype, index):
    """Every instruction set that this processor has; locations stay in float32 beside half values."""
    shapes, kernel = size["shapes"], library.usable[index % len(library.usable)]
    value, reference, offsets, logits, grad = problem(**size, dtype=dtype)
    locations, weights = sampling_from_logits(shapes, reference.double(), offsets.double(), logits.double())
    locations, weights = locations.float(), weights.to(dtype)
    got = [
        library.forward(value, shapes, None, locations, weights, kernel),
        *library.backward(grad, value, shapes, None, locations, weights, kernel),
    ]
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, dtype]
    for name, g, e in zip(
        ("output", "value", "locations", "weights"), got, exact(value, shapes, locations, weights, grad)
    ):
        assert_near(name, g, e, TOLERANCE[dtype])


@properties
@given(
    size=not_empty,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    index=st.integers(0, 9),
)
def test_fused_kernels_are_the_formula(library: Library, size, dtype, index):
    shapes, kernel = size["shapes"], library.usable[index % len(library.usable)]
    value, reference, offsets, logits, grad = problem(**size, dtype=dtype)
    reference = problem(**size, dtype=torch.float32)[1]
    got = [
        library.forward(value, shapes, reference, offsets, logits, kernel),
        *library.backward(grad, value, shapes, reference, offsets, logits, kernel),
    ]
    expected = exact_fused(value, shapes, reference, offsets, logits, grad)
    for name, g, e in zip(("output", "value", "offsets", "logits"), got, expected):
        assert_near(name, g, e, TOLERANCE[dtype])


@properties
@given(size=sizes, fused=st.booleans(), shared=st.booleans())
def test_operator_takes_any_shape_and_layout(size, fused, shared):
    """Through the public functions: empty batch, no queries, views with odd strides, one shared reference."""
    shapes = size["shapes"]
    value, reference, offsets, logits, grad = problem(**size, dtype=torch.float32)
    value = value.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2)
    offsets = torch.stack([offsets, offsets], -1)[..., 1]
    if shared:
        reference = problem(**{**size, "batch": 1}, dtype=torch.float32)[1]
    full = reference.expand(size["batch"], -1, -1, -1)
    if fused:
        got = run(
            lambda v, o, w: ms_deform_attn_fused(v, shapes, reference, o, w), value, offsets, logits, grad
        )
        expected = exact_fused(value, shapes, full, offsets, logits, grad)
    else:
        locations, weights = sampling_from_logits(shapes, full, offsets, logits)
        got = run(lambda v, x, w: ms_deform_attn(v, shapes, x, w), value, locations, weights, grad)
        expected = exact(value, shapes, locations, weights, grad)
    assert got[0].shape == (size["batch"], size["queries"], size["heads"] * size["channels"])
    for name, g, e in zip(("output", "value", "points", "weights"), got, expected):
        assert_near(name, g, e, 2e-5)


def test_gradcheck():
    shapes = ((2, 3), (4, 2))
    value, reference, offsets, logits, _ = problem(shapes)
    locations, weights = sampling_from_logits(shapes, reference, offsets, logits)
    leaves = [t.requires_grad_() for t in (value, locations.detach(), weights.detach())]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w), leaves)
    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(lambda v, r, o, w: ms_deform_attn_fused(v, shapes, r, o, w), leaves)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_of_reference_points(batch):
    """One reference for all images gets the sum over images; float32 against float64."""
    shapes = ((2, 3), (4, 2))
    value, reference, offsets, logits, grad = problem(shapes, batch=2)
    reference = reference[:batch]
    wanted = run(
        lambda v, r, o, w: ms_deform_attn_fused(v, shapes, r, o, w), value, reference, offsets, logits, grad
    )[2]
    got = run(
        lambda v, r, o, w: ms_deform_attn_fused(v, shapes, r, o, w),
        *(t.float() for t in (value, reference, offsets, logits, grad)),
    )[2]
    assert got.shape == reference.shape
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


# ---- borders and what is not a number

FORMS = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", FORMS)
def test_borders(dtype):
    """Cell centres, cell edges, the map's edge and beyond it by up to one cell, exact in binary."""
    shapes = ((4, 8),)
    value = problem(shapes, channels=3, heads=1, dtype=dtype)[0]
    xs = torch.arange(-3, 20, dtype=dtype) / 16  # every half cell from 1.5 cells outside to 1.5 outside
    ys = torch.arange(-4, 12, dtype=dtype) / 8
    grid = torch.cartesian_prod(xs, ys)
    locations = grid.view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(grid), 1, 1, 1, dtype=dtype)
    grad = torch.ones(1, len(grid), 3, dtype=dtype)
    got = run(lambda v, x, w: ms_deform_attn(v, shapes, x, w), value, locations, weights, grad)
    expected = exact(value, shapes, locations, weights, grad)
    for name, g, e in zip(("output", "value", "locations", "weights"), got, expected):
        if name == "locations":  # on a cell edge the slope has two values, on the border of the map one is 0
            inside = (grid * torch.tensor([8, 4]) % 1 == 0).all(-1)
            g, e = g[:, inside], e[:, inside.numpy()]
        assert_near(name, g, e, 1e-6)
    assert (got[0][0, (grid[:, 0] <= -0.5 / 8) | (grid[:, 1] >= 1 + 0.5 / 4)] == 0).all()


def same(got: Tensor, expected: np.ndarray) -> None:
    """Equal within float32 where finite, and NaN in the very same places."""
    got = got.detach().double().numpy().reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


ODD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38, -3e38, 1e6]


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["value", "location", "weight"])
def test_not_a_number(dtype, odd, where):
    """One odd entry: it reaches what it should and nothing else; locations outside any map give zero."""
    if where != "location" and np.isfinite(odd):
        return
    shapes = ((3, 4), (2, 2))
    value, reference, offsets, logits, grad = problem(shapes, queries=40, channels=9, seed=3, dtype=dtype)
    locations, weights = sampling_from_logits(shapes, reference, offsets, logits)
    if where == "value":
        value[0, 5, 1, 2] = odd
    if where == "location":
        locations[0, 3, 1, 0, 1, 0] = odd
        locations[0, 7, 0, 1, 0, 1] = odd
    if where == "weight":
        weights[0, 3, 1, 0, 1] = odd
    got = run(lambda v, x, w: ms_deform_attn(v, shapes, x, w), value, locations, weights, grad)
    expected = exact(value, shapes, locations, weights, grad)
    same(got[0], expected[0])
    if where == "location":
        for g, e in zip(got[1:], expected[1:]):
            same(g, e)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("odd", ODD)
def test_not_a_number_in_offsets(dtype, odd):
    shapes = ((3, 4), (2, 2))
    value, reference, offsets, logits, grad = problem(shapes, queries=40, channels=9, seed=3, dtype=dtype)
    offsets[0, 3, 1, 0, 1, 0] = odd
    offsets[0, 7, 0, 1, 0, 1] = odd
    got = run(lambda v, o, w: ms_deform_attn_fused(v, shapes, reference, o, w), value, offsets, logits, grad)
    for g, e in zip(got, exact_fused(value, shapes, reference, offsets, logits, grad)):
        same(g, e)


@pytest.mark.parametrize("dtype", FORMS)
def test_extreme_logits(dtype):
    """As torch's softmax: huge and minus-infinite logits are fine, a whole row of minus infinity is NaN."""
    shapes = ((3, 4), (2, 2))
    value, reference, offsets, logits, _ = problem(shapes, queries=5, channels=9, dtype=dtype)
    logits[0, 0] = torch.linspace(-200, 100, 4).view(2, 2)
    logits[0, 1, 0, 0, 0] = -float("inf")
    logits[0, 2, 0] = -float("inf")
    logits[0, 3, 1, 1, 1] = float("inf")
    logits[0, 4, 1, 0, 1] = float("nan")
    got = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    wanted = ms_deform_attn_reference(
        value, shapes, *sampling_from_logits(shapes, reference, offsets, logits)
    )
    same(got, wanted.double().numpy())
    bad = got.isnan().view(5, 2, 9).all(-1)
    assert bad.tolist() == [[False] * 2, [False] * 2, [True, False], [False, True], [False, True]]
