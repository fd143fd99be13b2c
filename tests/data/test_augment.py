"""Augmentation against its definition: a float64 bilinear reference, block means, colours that follow."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mpformer import config as settings
from mpformer.config import LargeScaleJitter
from mpformer.data import augment
from mpformer.data.augment import Placement
from mpformer.data.catalog import Polygons, Record, Rle, Segment
from mpformer.data.masks import Window
from tests.data.folders import photograph


def draws(height, width, config, count=2000):
    return [augment.place(height, width, config, augment.generator(0, 0, str(i))) for i in range(count)]


def test_generator_depends_on_each_argument_and_nothing_else():
    first = augment.generator(1, 2, "a").random(4)
    assert np.array_equal(first, augment.generator(1, 2, "a").random(4))
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (1, 2, "a", "order"), (12, 2, "a"), (1, 22, "a")):
        assert not np.array_equal(first, augment.generator(*other).random(4))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (50, 1000)])
def test_large_scale_jitter_follows_its_definition(height, width):
    config = LargeScaleJitter(size=(256, 320), scale=(0.1, 2.0), flip=0.25)
    fit = min(256 / height, 320 / width)
    placements = draws(height, width, config)
    factors = []
    for p in placements:
        w = p.window
        assert p.canvas == (256, 320)
        assert 0 <= w.x <= width - w.width
        assert 0 <= w.y <= height - w.height
        assert 1 <= w.out_width <= 320
        assert 1 <= w.out_height <= 256
        sx, sy = w.scale
        # aspect is kept up to rounding: half a pixel along each axis, in the source where it is cropped
        rounding = 0.5 * sum(1 / n for n in (w.width, w.height, w.out_width, w.out_height))
        assert sx == pytest.approx(sy, rel=rounding)
        factors.append(max(sx, sy) / fit)
        if w.width < width:
            assert w.out_width == 320
        if w.height < height:
            assert w.out_height == 256
    factors = np.array(factors)
    assert 0.25 - 0.04 < np.mean([p.flip for p in placements]) < 0.25 + 0.04
    # uniform in 0.1..2.0: the share below each tenth of the range
    shares = [(factors < 0.1 + 0.19 * k).mean() for k in range(1, 10)]
    assert np.allclose(shares, np.arange(1, 10) / 10, atol=0.04)


def test_crops_are_uniform_over_their_places():
    config = LargeScaleJitter(size=(96, 96), scale=(2.0, 2.0), flip=0.0)
    windows = [p.window for p in draws(96, 96, config, 4000)]
    assert {w.width for w in windows} == {48}
    counts = np.bincount([w.x for w in windows], minlength=49)
    assert len(counts) == 49
    assert counts.min() > 0.5 * 4000 / 49
    assert counts.max() < 1.6 * 4000 / 49
    assert abs(np.corrcoef([w.x for w in windows], [w.y for w in windows])[0, 1]) < 0.06


def bilinear(image, window):
    """The continuous image, linear between pixel centres, read at the centres of the result's pixels."""
    x = window.x + (np.arange(window.out_width) + 0.5) * window.width / window.out_width - 0.5
    y = window.y + (np.arange(window.out_height) + 0.5) * window.height / window.out_height - 0.5
    x = np.clip(x, window.x, window.x + window.width - 1)
    y = np.clip(y, window.y, window.y + window.height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, image.shape[1] - 1), np.minimum(y0 + 1, image.shape[0] - 1)
    fx, fy = (x - x0)[None, :, None], (y - y0)[:, None, None]
    image = image.astype(np.float64)
    top = image[y0][:, x0] * (1 - fx) + image[y0][:, x1] * fx
    below = image[y1][:, x0] * (1 - fx) + image[y1][:, x1] * fx
    return top * (1 - fy) + below * fy


@pytest.mark.parametrize("window", [Window(5, 3, 30, 20, 96, 64), Window(0, 0, 60, 40, 61, 41)])
def test_enlarging_is_bilinear(window):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    found = augment.resize_image(image, window).astype(float)
    assert np.abs(found - bilinear(image, window)).max() <= 1.01


def test_shrinking_takes_the_mean_of_the_area():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    found = augment.resize_image(image, Window(6, 12, 60, 48, 20, 12)).astype(float)
    means = image[12:60, 6:66].reshape(12, 4, 20, 3, 3).mean((1, 3))
    assert np.abs(found - means).max() <= 1


def test_a_window_at_scale_one_is_the_crop_itself():
    image = photograph()
    assert np.array_equal(augment.resize_image(image, Window(4, 6, 20, 10, 20, 10)), image[6:16, 4:24])


def colored_record():
    """An image in which a red triangle and a blue block lie on green, and its annotations."""
    image = np.full((80, 120, 3), (0, 200, 0), np.uint8)
    triangle = np.array([[20.0, 10.0], [70.0, 20.0], [30.0, 60.0]])
    block = np.zeros((80, 120), np.uint8, order="F")
    block[45:75, 60:110] = 1
    drawn = coco_mask.decode(coco_mask.frPyObjects([triangle.ravel().tolist()], 80, 120))[..., 0]
    image[drawn > 0] = (250, 0, 0)
    image[block > 0] = (0, 0, 250)
    segments = (
        Segment(4, False, Polygons((triangle,)), 1.0, 1),
        Segment(2, False, Rle(coco_mask.encode(block)["counts"]), 1.0, 2),
        Segment(2, True, Rle(coco_mask.encode(np.asfortranarray(drawn))["counts"]), 1.0, 3),
    )
    return image, Record("1", "", 120, 80, segments)


def augmented(image, record, task, placement):
    placed = list(augment.place_masks(record, task, placement))
    return augment.place_image(image, placement), [label for label, _ in placed], [mask for _, mask in placed]


def full(box, placement):
    mask = np.zeros((placement.window.out_height, placement.window.out_width), bool)
    mask[box.y : box.y + box.pixels.shape[0], box.x : box.x + box.pixels.shape[1]] = box.pixels
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_masks_stay_on_their_pixels(seed):
    """Colours tell which object a pixel is of, whatever was cropped, scaled and mirrored."""
    image, record = colored_record()
    config = LargeScaleJitter(size=(192, 192), scale=(0.8, 2.0))
    placement = augment.place(80, 120, config, augment.generator(seed, 0, "1"))
    pixels, labels, found = augmented(image, record, "instance", placement)
    assert sorted(labels) == sorted({4, 2} & set(labels))
    assert pixels.shape == (placement.window.out_height, placement.window.out_width, 3)
    for label, channel in ((4, 0), (2, 2)):
        painted = pixels[..., channel] > 125
        mask = full(found[labels.index(label)], placement) if label in labels else np.zeros_like(painted)
        # the borders differ by rounding: less than a pixel along the outline
        assert (painted ^ mask).sum() <= 0.02 * painted.size
        assert (painted & mask).sum() >= 0.9 * painted.sum()


def test_crowds_are_no_targets_but_count_in_semantic_maps():
    image, record = colored_record()
    whole = Placement(Window.whole(120, 80), False, (96, 128))
    for task in ("instance", "panoptic"):
        _, labels, _ = augmented(image, record, task, whole)
        assert labels == [4, 2]
    _, labels, found = augmented(image, record, "semantic", whole)
    assert labels == [2, 4]
    red, blue = image[..., 0] == 250, image[..., 2] == 250
    assert np.array_equal(full(found[0], whole), red | blue)
    assert np.array_equal(full(found[1], whole), full(found[1], whole) & (red | blue))


def test_mirroring_mirrors_image_and_masks_alike():
    image, record = colored_record()
    window = Window(10, 5, 90, 60, 90, 60)
    plain = augmented(image, record, "instance", Placement(window, False, (96, 96)))
    turned = augmented(image, record, "instance", Placement(window, True, (96, 96)))
    assert np.array_equal(plain[0][:, ::-1], turned[0])
    assert plain[1] == turned[1]
    placement = Placement(window, True, (96, 96))
    for a, b in zip(plain[2], turned[2], strict=True):
        assert np.array_equal(full(a, placement)[:, ::-1], full(b, placement))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # COCO's rule, by hand: short side 800 unless the long one would exceed 1333
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),
        ((300, 1000), (400, 1333)),
        ((1600, 1600), (800, 800)),
    ],
)
def test_size_for_evaluation(size, expected):
    config = settings.TestResize()
    assert augment.test_size(*size, config) == expected
    image = np.zeros((*size, 3), np.uint8)
    assert augment.test_resize(image, config).shape == (*expected, 3)
