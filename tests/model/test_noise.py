"""Noise against the formulas, against slow loops, and against what the released code was seen to do."""

import math

import pytest
import torch

from mpformer.model import noise


def rectangles(boxes, size):
    """One mask per (x0, y0, x1, y1), ends exclusive."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    return masks


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- point noise ----------------------------------------------------------------------------------


def test_point_counts_are_uniform_up_to_the_ratio():
    masks = rectangles([(2, 3, 7, 7)] * 6000, (12, 16))  # area 20
    noised = noise.point_noise(masks, 0.5, uniform(6000, 192), uniform(6000, seed=1))
    counts = (noised ^ masks).flatten(1).sum(1)
    assert counts.min() == 0
    assert counts.max() == 10
    frequency = torch.bincount(counts, minlength=11) / 6000
    assert (frequency - 1 / 11).abs().max() < 4 * math.sqrt(1 / 11 * 10 / 11 / 6000)
    # any cell of the map is as likely as any other
    rate = (noised ^ masks).flatten(1).float().mean(0)
    assert (rate - 5 / 192).abs().max() < 5 * math.sqrt(5 / 192 / 6000)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_equation_4_bounds_exactly_ratio_times_area_flips(ratio):
    masks = rectangles([(0, 0, 20, 10)] * 50, (32, 32))  # area 200
    noised = noise.point_noise(masks, ratio, uniform(50, 1024), torch.full((50,), 1 - 2**-24))
    flips = (noised ^ masks).flatten(1).sum(1)
    assert (flips == int(ratio * 200)).all()
    iou = (noised & masks).flatten(1).sum(1) / (noised | masks).flatten(1).sum(1)
    assert (iou >= 1 - ratio - 1e-6).all()
    assert (iou <= 1 / (1 + ratio) + 1e-6).all()


def test_point_noise_at_its_limits():
    masks = rectangles([(0, 0, 4, 4), (0, 0, 0, 0), (1, 1, 2, 2)], (4, 4))
    scores, most = uniform(3, 16), torch.full((3,), 1 - 2**-24)
    assert torch.equal(noise.point_noise(masks, 0.0, scores, most), masks)
    # an empty object and one of a single cell have no cell to flip at 0.2
    noised = noise.point_noise(masks, 0.2, scores, most)
    assert torch.equal(noised[1:], masks[1:])
    assert int((noised[0] ^ masks[0]).sum()) == 3
    # a ratio beyond the map flips all of it at most
    assert torch.equal(noise.point_noise(masks[:1], 5.0, scores[:1], most[:1]), ~masks[:1])
    assert noise.point_noise(masks[:0], 0.2, scores[:0], most[:0]).shape == (0, 4, 4)


def test_released_point_noise_flips_every_cell_by_itself():
    """Area 1109 of 16384 at 0.2: 0.2 * area flips on average, hardly any spread, most of them outside."""
    mask = torch.zeros(400, 128, 128, dtype=torch.bool)
    mask.view(400, -1)[:, :1109] = True
    flips = noise.released_point_noise(mask, 0.2, uniform(400, 16384)) ^ mask
    counts = flips.flatten(1).sum(1).double()
    assert counts.mean() == pytest.approx(0.2 * 1109, rel=0.02)
    probability = 0.2 * 1109 / 16384
    assert counts.std() == pytest.approx(math.sqrt(16384 * probability * (1 - probability)), rel=0.15)
    assert (flips & mask).flatten(1).sum(1).double().mean() == pytest.approx(1109 * probability, rel=0.1)
    assert (flips & ~mask).flatten(1).sum(1).double().mean() == pytest.approx(15275 * probability, rel=0.03)


# --- shift ----------------------------------------------------------------------------------------


def test_shift_moves_along_both_axes_within_its_bounds():
    box = (10, 20, 30, 26)  # 20 wide, 6 high
    masks = rectangles([box] * 2000, (64, 64))
    for ratio in (0.2, 1.0):
        shifted = noise.shift_noise(masks, ratio, uniform(2000, 2))
        x0, y0, x1, y1 = noise.mask_boxes(shifted).unbind(1)
        assert (x1 - x0 == 20).all()
        assert (y1 - y0 == 6).all()
        assert (shifted.flatten(1).sum(1) == 120).all()
        for moved, reach in ((x0 - 10, ratio * 10), (y0 - 20, ratio * 3)):
            assert moved.abs().max() <= round(reach)
            assert moved.double().mean().abs() < 0.1 * reach + 0.05
            assert moved.double().std() == pytest.approx(reach / math.sqrt(3), rel=0.1, abs=0.2)
        # the centre stays inside the box (MP-Former section 4.3)
        center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
        assert (center_x >= box[0]).all()
        assert (center_x <= box[2]).all()
        assert (center_y >= box[1]).all()
        assert (center_y <= box[3]).all()


def test_shift_keeps_every_cell_on_the_map():
    random = torch.Generator().manual_seed(0)
    masks = torch.zeros(200, 24, 24, dtype=torch.bool)
    masks[:, :9, 12:] = torch.rand(200, 9, 12, generator=random) < 0.4  # in the upper right corner
    shifted = noise.shift_noise(masks, 1.0, uniform(200, 2))
    assert torch.equal(shifted.flatten(1).sum(1), masks.flatten(1).sum(1))
    # the shape is the same, elsewhere
    for before, after in zip(masks, shifted):
        cells, moved = before.nonzero(), after.nonzero()
        assert torch.equal(cells - cells.amin(0), moved - moved.amin(0))
    assert not torch.equal(masks, shifted)
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert torch.equal(noise.shift_noise(nothing, 0.5, uniform(1, 2)), nothing)


# --- scale ----------------------------------------------------------------------------------------


def test_scale_is_resizing_about_the_centre():
    random = torch.Generator().manual_seed(1)
    masks = torch.zeros(30, 40, 48, dtype=torch.bool)
    masks[:, 10:30, 9:34] = torch.rand(30, 20, 25, generator=random) < 0.5
    amounts = uniform(30)
    scaled = noise.scale_noise(masks, 0.4, amounts)
    for mask, result, amount in zip(masks, scaled, amounts.tolist()):
        x0, y0, x1, y1 = noise.mask_boxes(mask[None])[0].tolist()
        factor = 1 + 0.4 * (2 * amount - 1)
        for y in range(40):
            for x in range(48):
                from_y = (y0 + y1) / 2 + (y + 0.5 - (y0 + y1) / 2) / factor
                from_x = (x0 + x1) / 2 + (x + 0.5 - (x0 + x1) / 2) / factor
                near = min(abs(v - round(v)) for v in (from_x, from_y))
                if near > 1e-4:  # on a cell's edge rounding decides
                    inside = 0 <= from_y < 40 and 0 <= from_x < 48
                    assert bool(result[y, x]) == (inside and bool(mask[int(from_y), int(from_x)]))


def test_scale_enlarges_and_shrinks():
    masks = rectangles([(24, 20, 44, 40)] * 1000, (64, 64))
    scaled = noise.scale_noise(masks, 0.2, uniform(1000))
    side = scaled.any(1).sum(1).double() / 20
    assert side.min() >= 0.8 - 1 / 20
    assert side.max() <= 1.2 + 1 / 20
    assert side.mean() == pytest.approx(1.0, abs=0.02)
    assert side.std() == pytest.approx(0.4 / math.sqrt(12), rel=0.1)


# --- the released code's shift and scale ----------------------------------------------------------


def relative(box, size):
    x0, y0, x1, y1 = box
    return [(x0 + x1) / 2 / size[1], (y0 + y1) / 2 / size[0], (x1 - x0) / size[1], (y1 - y0) / size[0]]


def test_released_shift_swaps_the_axes():
    """A box of .5 x .1 on 64 x 128 cells at 0.4: rows move by up to 12.8 cells, columns by up to 2.6."""
    box, size = (32, 28, 96, 34), (64, 128)
    masks = rectangles([box] * 1000, size)
    boxes = torch.tensor([relative(box, size)] * 1000)
    shifted = noise.released_shift_noise(masks, 0.4, boxes, uniform(1000, 2))
    x0, y0, _, _ = noise.mask_boxes(shifted).unbind(1)
    assert (y0 - 28).abs().max() in (12, 13)
    assert (x0 - 32).abs().max() in (2, 3)


def test_released_shift_piles_up_at_the_border():
    size = (32, 32)
    masks = rectangles([(0, 0, 12, 12)] * 300, size)
    boxes = torch.tensor([relative((0, 0, 12, 12), size)] * 300)
    amounts = uniform(300, 2)
    shifted = noise.released_shift_noise(masks, 1.0, boxes, amounts)
    for result, (a, b) in zip(shifted[:50], amounts[:50].tolist()):
        wanted = torch.zeros(size, dtype=torch.bool)
        for y in range(12):
            for x in range(12):
                row = min(max(y + (2 * a - 1) * 6, 0), 31)
                column = min(max(x + (2 * b - 1) * 6, 0), 31)
                wanted[int(row), int(column)] = True
        assert torch.equal(result, wanted)
    kept = shifted.flatten(1).sum(1) / 144
    assert kept.max() <= 1
    assert kept.mean() < 0.9  # about half of the moves push it into the corner


def test_released_scale_only_enlarges_half_of_the_objects():
    size, box = (20, 30), (9, 4, 21, 10)
    masks = rectangles([box] * 400, size)
    boxes = torch.tensor([relative(box, size)] * 400)
    decisions = uniform(400)
    scaled = noise.released_scale_noise(masks, 0.2, boxes, decisions)
    changed = (scaled != masks).flatten(1).any(1)
    assert torch.equal(changed, decisions > 0.5)
    assert (scaled.flatten(1).sum(1) >= 72).all()
    # by hand: enlarged to 25 x 37, moved back by (20 - 25) * x and (30 - 37) * y, both cut to whole cells
    wanted = torch.zeros(size, dtype=torch.bool)
    for y in range(25):
        for x in range(37):
            if masks[0, y * 20 // 25, x * 30 // 37]:
                row = min(max(y + math.trunc(-5 * 15 / 30), 0), 19)
                column = min(max(x + math.trunc(-7 * 7 / 20), 0), 29)
                wanted[row, column] = True
    assert torch.equal(scaled[int(changed.int().argmax())], wanted)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 80])
def test_label_noise_changes_labels_at_its_rate(classes):
    labels = torch.randint(0, classes, (40000,), generator=torch.Generator().manual_seed(0))
    decisions, choices = uniform(40000), uniform(40000, seed=1)
    changed = noise.label_noise(labels, classes, 0.2, decisions, choices)
    assert torch.equal(changed != labels, decisions < 0.2)
    assert (changed != labels).double().mean() == pytest.approx(0.2, abs=0.01)
    assert changed.min() >= 0
    assert changed.max() < classes
    # each other class is as likely
    step = (changed - labels)[changed != labels] % classes
    frequency = torch.bincount(step, minlength=classes)[1:] / len(step)
    assert (frequency - 1 / (classes - 1)).abs().max() < 0.02
    # the released code may choose the class that it replaces
    released = noise.released_label_noise(labels, classes, 0.2, decisions, choices)
    rate = (released != labels).double().mean()
    assert rate == pytest.approx(0.2 * (classes - 1) / classes, abs=0.01)


def test_label_noise_of_one_class_is_nothing():
    labels = torch.zeros(5, dtype=torch.long)
    assert torch.equal(noise.label_noise(labels, 1, 1.0, uniform(5), uniform(5)), labels)


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24])
def test_label_noise_at_the_ends_of_its_random_numbers(value):
    labels = torch.arange(80)
    ends = torch.full((80,), value)
    for flip in (noise.label_noise, noise.released_label_noise):
        changed = flip(labels, 80, 1.0, torch.zeros(80), ends)
        assert changed.min() >= 0
        assert changed.max() < 80
