"""Photometric distortion against its definition, colour by colour."""

import colorsys

import numpy as np
import pytest

from mpformer.data.augment import generator
from mpformer.data.colors import ColorJitter, draw_colors
from tests.data.folders import photograph


def test_nothing_changes_by_default():
    image = photograph()
    assert np.array_equal(ColorJitter()(image), image)


def test_brightness_and_contrast():
    image = photograph()
    for beta in (-32.0, 20.5):
        expected = np.clip(image.astype(float) + beta, 0, 255)
        assert np.abs(ColorJitter(brightness=beta)(image) - expected).max() < 1
    for alpha in (0.5, 1.4):
        for last in (False, True):
            expected = np.clip(image.astype(float) * alpha, 0, 255)
            found = ColorJitter(contrast=alpha, contrast_last=last)(image)
            assert np.abs(found - expected).max() < 1


def test_saturation_and_hue():
    """Against Python's own HSV; OpenCV keeps hue in steps of two degrees."""
    image = photograph()[::4, ::4]
    found = ColorJitter(saturation=0.6, hue=15)(image).astype(float)
    expected = np.empty_like(found)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
        expected[place] = 255 * np.array(colorsys.hsv_to_rgb((hue + 30 / 360) % 1, saturation * 0.6, value))
    assert np.abs(found - expected).mean() < 2
    assert np.abs(found - expected).max() < 12


def test_the_order_of_contrast_matters():
    image = photograph()
    settings = {"contrast": 1.5, "saturation": 1.5}
    first, last = (ColorJitter(**settings, contrast_last=x)(image) for x in (False, True))
    assert not np.array_equal(first, last)


def test_draws_keep_to_their_ranges():
    drawn = [draw_colors(generator(0, 0, str(i))) for i in range(2000)]
    columns = {
        "brightness": ([d.brightness for d in drawn], 0.0, -32, 32),
        "contrast": ([d.contrast for d in drawn], 1.0, 0.5, 1.5),
        "saturation": ([d.saturation for d in drawn], 1.0, 0.5, 1.5),
        "hue": ([d.hue for d in drawn], 0, -18, 18),
    }
    for values, off, low, high in columns.values():
        on = np.array([v for v in values if v != off])
        assert 0.44 * 2000 < len(on) < 0.56 * 2000
        assert on.min() >= low
        assert on.max() <= high
        assert on.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
        assert on.min() < low + 0.05 * (high - low)
        assert on.max() > high - 0.05 * (high - low)
    assert 0.45 < np.mean([d.contrast_last for d in drawn]) < 0.55
