"""Drawing: colours at the masks, captions without overlap, lossless PNG."""

import numpy as np
import pytest

from mpformer import draw
from mpformer.types import ClassInfo, ClassTable

CLASSES = ClassTable((ClassInfo("cat", 1, True, (200, 0, 0)), ClassInfo("dog", 2)))


def corner(size: tuple[int, int], top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_is_lossless(shape, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    back = draw.decode_png(draw.encode_png(array))
    assert back.dtype == dtype
    assert (back == array).all()


def test_overlay_tints_the_mask_and_leaves_the_rest():
    image = np.full((600, 800, 3), 100, np.uint8)
    picture = draw.overlay(image, [corner((600, 800), 100, 100, 200)], [0], CLASSES, captions=False)
    assert picture.shape == image.shape
    assert picture[200, 200].tolist() == [150, 50, 50]
    assert (picture[:, 400:] == 100).all()
    assert (image == 100).all()  # the input is left alone


def test_a_smaller_mask_lies_on_top_of_a_larger_one():
    image = np.zeros((600, 800, 3), np.uint8)
    masks = [corner((600, 800), 200, 200, 50), corner((600, 800), 0, 0, 600)]
    picture = draw.overlay(image, masks, [0, 1], CLASSES, captions=False)
    around = picture[100, 100].astype(int)
    assert picture[225, 225].tolist() == [(v + own) // 2 for v, own in zip(around, (200, 0, 0))]


def test_objects_of_one_class_and_a_class_without_a_colour_can_be_told_apart():
    image = np.zeros((480, 480, 3), np.uint8)
    masks = [corner((480, 480), 0, 120 * i, 100) for i in range(4)]
    picture = draw.overlay(image, masks, [0, 0, 0, 1], CLASSES, captions=False)
    colours = [picture[50, 120 * i + 50].astype(int) for i in range(4)]
    for i in range(4):
        assert colours[i].max() > 60
        assert all(abs(colours[i] - colours[j]).max() > 10 for j in range(i))


def test_small_images_are_enlarged_until_captions_can_be_read():
    picture = draw.overlay(np.zeros((100, 150, 3), np.uint8), [], [], CLASSES)
    assert picture.shape == (500, 750, 3)


def test_captions_never_overlap_and_stay_inside(monkeypatch):
    """Forty masks in one place: the captions that are drawn do not overlap."""
    boxes = []
    original = draw._caption

    def spy(*arguments):
        original(*arguments)
        boxes[:] = arguments[-1]

    monkeypatch.setattr(draw, "_caption", spy)
    size = (480, 640)
    masks = [corner(size, 5 * i, 8 * i, 60) for i in range(40)]
    picture = draw.overlay(np.zeros((*size, 3), np.uint8), masks, [0] * 40, CLASSES, [0.5] * 40)
    assert len(boxes) > 10
    for i, a in enumerate(boxes):
        assert min(a) >= 0
        assert a[2] <= size[0]
        assert a[3] <= size[1]
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
        top, left = a[:2]
        assert picture[top : a[2], left : a[3]].max() > 230  # white letters


def captions_of(monkeypatch, *arguments) -> list[tuple[int, int, int, int]]:
    """The boxes of the captions of an overlay, in the order in which they are drawn."""
    boxes: list[tuple[int, int, int, int]] = []
    original = draw._caption

    def spy(*drawn):
        original(*drawn)
        boxes[:] = drawn[-1]

    monkeypatch.setattr(draw, "_caption", spy)
    draw.overlay(*arguments)
    return boxes


def test_captions_of_small_objects_stand_beside_them_and_cover_none(monkeypatch):
    size = (600, 800)
    small = [(y, x, 12) for y in (0, 290, 588) for x in (0, 400, 788)]
    masks = [corner(size, 0, 0, 600), *(corner(size, *one) for one in small)]
    boxes = captions_of(monkeypatch, np.zeros((*size, 3), np.uint8), masks, [1] + [0] * 9, CLASSES)
    assert len(boxes) == 10
    for top, left, bottom, right in boxes:
        assert not any(
            top < y + side and y < bottom and left < x + side and x < right for y, x, side in small
        )
    nearest = [min(max(y - b, t - y - s, x - r, l - x - s) for t, l, b, r in boxes[1:]) for y, x, s in small]
    assert max(nearest) <= 2  # each has one within two pixels


def test_framed_objects_have_a_red_frame_and_others_none():
    size = (600, 800)
    masks = [corner(size, 100, 100, 60), corner(size, 400, 600, 60)]
    picture = draw.overlay(np.zeros((*size, 3), np.uint8), masks, [1, 1], CLASSES, captions=False, framed=[1])
    red = (picture == (230, 30, 30)).all(axis=2)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert 380 < rows[0] < 400 < 460 <= rows[-1] < 480
    assert 580 < columns[0] < 600 < 660 <= columns[-1] < 680
    assert not (red & (masks[0] | masks[1])).any()
    empty = draw.overlay(np.zeros((*size, 3), np.uint8), [masks[0] & masks[1]], [0], CLASSES, framed=[0])
    assert not empty.any()


def test_empty_masks_and_no_masks_are_fine():
    image = np.full((480, 500, 3), 7, np.uint8)
    assert (draw.overlay(image, [np.zeros((480, 500), bool)], [0], CLASSES, [0.9]) == 7).all()


def test_side_by_side_puts_images_of_all_sizes_on_one_sheet():
    images = [
        np.full(s, 50 * (i + 1), np.uint8) for i, s in enumerate([(100, 200, 3), (50, 50, 3), (80, 40)])
    ]
    row = draw.side_by_side(images)
    assert row.shape == (100, 200 + 100 + 50 + 2 * 8, 3)
    assert row[50, 100, 0] == 50
    assert row[50, 208 + 50, 0] == 100
    grid = draw.side_by_side(images, ["one", "two", "a title much too long for its image"], columns=2)
    assert grid.shape[1] == 2 * 200 + 8
    assert (grid[:24] < 100).any()  # the titles' letters


def test_curves_are_drawn_with_bands_and_without_points(tmp_path):
    path = tmp_path / "new" / "curves.png"
    series = {"one": [(0, 1.0), (10, 2.0)], "none yet": []}
    draw.curves(series, "images", "AP", "title", path, bands={"one": [(0, 0.5, 1.5), (10, 1.5, 2.5)]})
    picture = draw.decode_png(path.read_bytes())
    assert picture.shape[0] > 400
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50


def test_markers_stand_where_something_was_measured(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def spy(axes, *arguments, **options):
        lines = plot(axes, *arguments, **options)
        drawn.extend(lines)
        return lines

    monkeypatch.setattr(Axes, "plot", spy)
    mean = [(x / 10, x / 5) for x in range(60)]
    draw.curves(
        {"one": mean}, "hours", "AP", "title", tmp_path / "a.png", measured={"one": [(0.5, 1.0), (3.0, 6.1)]}
    )
    marked = [line for line in drawn if line.get_marker() not in ("None", None, "")]
    assert [line.get_xydata().tolist() for line in marked] == [[[0.5, 1.0], [3.0, 6.1]]]
