"""Augmentation against its definition: a float64 bilinear reference, block means, colours that follow."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mpformer import config as settings
from mpformer.config import LargeScaleJitter
from mpformer.data import augment
from mpformer.data.augment import Placement
from mpformer.data.images import image_size, load_image, load_reduced_image
from mpformer.data.masks import Window
from mpformer.data.records import Polygons, Record, Rle, Segment
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
        assert 0 <= w.x <= width - w.width
        assert 0 <= w.y <= height - w.height
        assert 1 <= w.out_width <= 320
        assert 1 <= w.out_height <= 256
        sx, sy = w.scale
        # aspect is kept up to rounding: half a pixel along each axis, in the source where it is cropped;
        # what is shrunk below half is cropped to whole blocks of 8 pixels
        block = 4 if max(sx, sy) < 0.51 else 0.5
        rounding = block / w.width + block / w.height + 0.5 / w.out_width + 0.5 / w.out_height
        assert sx == pytest.approx(sy, rel=rounding)
        factors.append(max(sx, sy) / fit)
        if w.width < width - 7:
            assert w.out_width == 320
        if w.height < height - 7:
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


def test_semantic_recipes_follow_their_definition():
    """ADE20K: short side 512 x (0.5, 0.6, ... 2.0), long side at most 2048, crop 512, colours."""
    config = settings.ShortEdgeJitter()
    placements = draws(300, 1200, config)
    scales = np.array([p.window.scale[0] for p in placements])
    shorts = {min(int(512 * (0.5 + 0.1 * k)), 512) for k in range(16)}
    assert {p.window.out_height for p in placements} == shorts
    # 512 x 2.0 / 300 would make the long side 4096: it stops at 2048
    assert scales.max() == pytest.approx(2048 / 1200, rel=0.01)
    assert all(p.colors is not None for p in placements)
    plain = settings.ShortEdgeJitter(colors=False, steps=None, size=(512, 1024), short=1024, long=4096)
    placements = draws(1024, 2048, plain)
    assert all(p.colors is None for p in placements)
    assert len({p.window.width for p in placements}) > 300
    large = [p.window for p in placements if p.window.scale[0] > 0.52]
    assert {(w.out_height, w.out_width) for w in large} == {(512, 1024)}


def test_standard_scales_show_the_whole_image():
    config = settings.ShortestEdge()
    placements = draws(480, 640, config, 600)
    windows = [p.window for p in placements]
    assert {(w.x, w.y, w.width, w.height) for w in windows} == {(0, 0, 640, 480)}
    assert {p.window.out_height for p in placements} == set(config.shorts)
    # 300x1000: short side 640 makes the long one 2133, so it stops at 1333
    assert {p.window.out_width for p in draws(300, 1000, config, 50)} == {1333}


def test_crops_as_in_detr():
    config = settings.ShortestEdge(crop=0.5, shorts=(480, 800))
    placements = draws(480, 640, config, 3000)
    cropped = [p.window for p in placements if (p.window.width, p.window.height) != (640, 480)]
    # with the short side brought to 400, crops of 400 to 600 keep its whole height, some its whole width, too
    assert 0.38 * 3000 < len(cropped) < 0.53 * 3000
    for w in cropped:
        assert 0 <= w.x <= 640 - w.width
        assert 0 <= w.y <= 480 - w.height
        assert w.width >= 384 * 480 / 600 - 1
        assert w.height >= 384 * 480 / 600 - 1
        assert min(w.out_width, w.out_height) in (480, 800) or max(w.out_width, w.out_height) == 1333
        assert w.scale[0] == pytest.approx(w.scale[1], rel=2 / min(w.width, w.height))


def test_a_crop_moves_within_the_image():
    first = Placement(Window(0, 0, 30, 20, 60, 40), False)
    random = augment.generator(0, 0, "a")
    windows = [augment.moved(first, 40, 50, random).window for _ in range(300)]
    assert {w.x for w in windows} == set(range(21))
    assert {w.y for w in windows} == set(range(21))
    assert {(w.width, w.height, w.out_width, w.out_height) for w in windows} == {(30, 20, 60, 40)}


def test_cutting_keeps_scale_and_corner():
    placement = Placement(Window(5, 6, 100, 80, 200, 160), True)
    w = augment.cut(placement, 80, 400).window
    assert w == Window(5, 6, 100, 40, 200, 80)


@pytest.mark.parametrize("factor", [2, 4])
def test_decoding_smaller_stays_within_its_tolerance(tmp_path, factor, sample_data):
    """Mean difference to decoding at full size below 5 of 255, on real photographs."""
    paths = sorted((sample_data / "coco_mini" / "val2017").glob("*.jpg"))[:6]
    for path in paths:
        height, width = image_size(str(path))
        record = Record("1", str(path), width, height, ())
        part_width, part_height = width - width % 8, height - height % 8
        window = Window(0, 0, part_width, part_height, part_width // factor - 3, part_height // factor - 2)
        placement = Placement(window, False)
        assert augment.reduction(window) == factor
        small, used = load_reduced_image(record, factor)
        assert used == factor
        exact = augment.place_image(load_image(record), placement).astype(float)
        found = augment.place_image(small, placement, factor).astype(float)
        assert np.abs(found - exact).mean() < 5


def test_windows_that_cannot_be_decoded_smaller():
    assert augment.reduction(Window(0, 0, 640, 480, 320, 240)) == 2
    assert augment.reduction(Window(0, 0, 640, 480, 321, 240)) == 1
    assert augment.reduction(Window(4, 0, 640, 480, 80, 60)) == 4
    assert augment.reduction(Window(0, 0, 640, 481, 80, 60)) == 1


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
    whole = Placement(Window.whole(120, 80), False)
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
    plain = augmented(image, record, "instance", Placement(window, False))
    turned = augmented(image, record, "instance", Placement(window, True))
    assert np.array_equal(plain[0][:, ::-1], turned[0])
    assert plain[1] == turned[1]
    placement = Placement(window, True)
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


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        ({"short": 512, "long": 2048}, (300, 400), (512, 683)),  # ADE20K
        ({"short": 512, "long": None}, (100, 900), (512, 4608)),
        ({"short": None, "long": None}, (1024, 2048), (1024, 2048)),  # Cityscapes
        ({"short": None, "long": 2048}, (3000, 4000), (1536, 2048)),  # Mapillary
        ({"short": None, "long": 2048}, (800, 600), (2048, 1536)),
    ],
)
def test_sizes_of_the_other_data_sets(rule, size, expected):
    assert augment.test_size(*size, settings.TestResize(**rule)) == expected
