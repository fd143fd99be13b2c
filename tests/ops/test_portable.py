"""Deformable attention as it is exported, against the operator's definition."""

import pytest
import torch

from mpformer.ops.portable import ms_deform_attn_portable
from mpformer.ops.reference import ms_deform_attn_reference, sampling_from_logits

SHAPES = ((3, 4), (5, 7), (1, 1))
FLAT = [side for shape in SHAPES for side in shape]


def inputs(spread: float, dtype: torch.dtype = torch.float64):
    """Locations around the middle of the map, up to `spread` maps away."""
    random = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, cells, 3, 5, generator=random, dtype=dtype)
    locations = 0.5 + spread * (torch.rand(2, 11, 3, len(SHAPES), 4, 2, generator=random, dtype=dtype) - 0.5)
    weights = torch.randn(2, 11, 3, len(SHAPES), 4, generator=random, dtype=dtype)
    return value, SHAPES, locations, weights


@pytest.mark.parametrize("spread", [0.9, 1.5, 6.0, 1e6])
def test_it_is_the_function_of_the_operator_inside_and_outside_of_the_map(spread):
    value, shapes, locations, weights = inputs(spread)
    found = ms_deform_attn_portable(value, FLAT, None, locations, weights)
    wanted = ms_deform_attn_reference(value, shapes, locations, weights)
    assert wanted.abs().max() > (0.5 if spread < 10 else -1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_locations_on_centres_and_borders():
    value, shapes, locations, weights = inputs(1.0)
    for place in (0.0, 1.0, 0.5 / 7, -0.5 / 7, 1 + 0.5 / 7, 1 / 7, -1 / 7):
        same = torch.full_like(locations, place)
        found = ms_deform_attn_portable(value, FLAT, None, same, weights)
        wanted = ms_deform_attn_reference(value, shapes, same, weights)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_offsets_and_logits():
    value, shapes, locations, logits = inputs(1.0)
    offsets = 9 * (locations - 0.5)
    reference = locations[:1, :, 0, :, 0]
    found = ms_deform_attn_portable(value, FLAT, reference, offsets, logits)
    wanted = ms_deform_attn_reference(
        value, shapes, *sampling_from_logits(shapes, reference, offsets, logits)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
