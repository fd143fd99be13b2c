"""The compiled mask losses against torch's operators in float64, for every instruction set that runs here."""

import pytest
import torch
from torch.nn import functional as F

from mpformer.model.points import sample, uncertain_points, unpack
from mpformer.ops.kernels import cpu_library
from mpformer.ops.mask_points import MaskPairs, mask_point_losses

LIBRARY = cpu_library(torch.zeros(1))
KERNELS = LIBRARY.usable if LIBRARY else []

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled CPU kernel")


def packed(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=random)


def problem(candidates=301, uniform=27):
    """Two images with 4 and 2 pairs; points of any number, maps and masks of odd sizes."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, 17, generator=random) * 4
    images = []
    for b, (queries, objects, limit) in enumerate(
        (([3, 0, 4, 1], [0, 1, 1, 0], None), ([2, 0], [2, 0], 0.7))
    ):
        masks = torch.rand(3, 37, 50, generator=random) < 0.4
        points = (packed(len(queries), candidates, seed=b), packed(len(queries), uniform, seed=9 + b))
        limits = () if limit is None else ((limit, 0.9),)
        images.append(MaskPairs(torch.tensor(queries), torch.tensor(objects), masks, *points, *limits))
    return logits, images


def composed(logits, images, important):
    """The definition, in float64."""
    losses = []
    for b, image in enumerate(images):
        chosen = logits[b, image.queries]
        points = uncertain_points(chosen, unpack(image.candidates), unpack(image.uniform), important)
        predicted = sample(chosen, points)
        wanted = sample(image.masks[image.objects].double(), points)
        counted = (points < torch.tensor(image.limit)).all(2).double()
        entropy = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none") * counted
        p, t = predicted.sigmoid() * counted, wanted * counted
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        losses.append(torch.stack((entropy.sum(1) / counted.sum(1).clamp(min=1), dice)))
    return torch.cat(losses, 1)


def losses_and_gradient(function, logits):
    logits = logits.detach().requires_grad_(True)
    losses = function(logits)
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    (losses * weights).sum().backward()
    return losses.detach(), logits.grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("important", [0, 1, 93, 301])
def test_losses_and_gradients(kernel, important):
    logits, images = problem()
    expected = losses_and_gradient(lambda x: composed(x, images, important), logits.double())
    got = losses_and_gradient(
        lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, important, kernel)), logits
    )
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), expected[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_logits_neither_overflow_nor_vanish(kernel):
    logits, images = problem()
    logits *= 40
    expected, _ = losses_and_gradient(lambda x: composed(x, images, 93), logits.double())
    got, gradient = losses_and_gradient(
        lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, 93, kernel)), logits
    )
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(gradient).all()


def test_of_equally_uncertain_candidates_the_first_are_kept():
    """A flat map: all candidates tie, and the losses are those of the first ones."""
    _, (image, _) = problem()
    flat = torch.full((1, 5, 11, 17), 0.0)
    first = MaskPairs(image.queries, image.objects, image.masks, image.candidates[:, :50], image.uniform)
    results = [mask_point_losses(LIBRARY, flat, [pairs], 50) for pairs in (image, first)]
    # at the border, where the map ends, a candidate may be no further from zero: there is nothing but zero
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_part_of_a_head_and_half_precision_are_read_where_they_lie():
    logits, images = problem()
    wide = torch.randn(2, 9, 11, 17)
    wide[:, 3:8] = logits
    got = losses_and_gradient(lambda x: torch.stack(mask_point_losses(LIBRARY, x[:, 3:8], images, 93)), wide)
    expected = losses_and_gradient(lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, 93)), logits)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1][:, 3:8], expected[1])
    half = logits.bfloat16()
    rounded = losses_and_gradient(
        lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, 93)), half.float()
    )
    got = losses_and_gradient(lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, 93)), half)
    assert torch.equal(got[0], rounded[0])
    assert got[1].dtype == torch.bfloat16
    assert torch.equal(got[1], rounded[1].bfloat16())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("important", [0, 93])
@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1], [0, 1, 0, 1, 0]])
def test_pairs_that_share_their_points_are_as_with_copies_of_them(kernel, important, order):
    """Neighbours with the same object and points, and the same pairs in turn, to the last bit."""
    random = torch.Generator().manual_seed(3)
    logits, masks = torch.randn(1, 5, 11, 17, generator=random), torch.rand(2, 37, 50, generator=random) < 0.4
    rows, queries, uniform = torch.tensor(order), torch.tensor([4, 0, 2, 1, 3]), packed(2, 70)
    candidates = packed(5, 301, seed=1)
    sharing = MaskPairs(queries, 1 - rows, masks, candidates, uniform, rows=rows)
    copies = MaskPairs(queries, 1 - rows, masks, candidates, uniform[rows])
    results = [
        losses_and_gradient(
            lambda x, pairs=pairs: torch.stack(mask_point_losses(LIBRARY, x, [pairs], important, kernel)),
            logits,
        )
        for pairs in (sharing, copies)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_bits_do_not_depend_on_the_threads():
    logits, images = problem()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                losses_and_gradient(lambda x: torch.stack(mask_point_losses(LIBRARY, x, images, 93)), logits)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing_to_lose():
    logits, images = problem()
    none = [
        MaskPairs(image.queries[:0], image.objects[:0], image.masks, packed(0, 30), packed(0, 3))
        for image in images
    ]
    losses, gradient = losses_and_gradient(
        lambda x: torch.stack(mask_point_losses(LIBRARY, x, none, 10)), logits
    )
    assert losses.shape == (2, 0)
    assert not gradient.any()
