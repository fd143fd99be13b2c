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
    picture = draw.overlay(image, masks, [0, 1], CLASSES, captions=False, opacity=1.0)
    assert picture[225, 225].tolist() == [200, 0, 0]


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

    def spy(canvas, text, mask, color, taken):
        original(canvas, text, mask, color, taken)
        boxes[:] = taken

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
