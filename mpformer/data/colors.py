"""Photometric distortion of brightness, contrast, saturation and hue, as in the code of SSD (Liu et al.)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class ColorJitter:
    """A change of the colours of one sample; the defaults change nothing."""

    brightness: float = 0.0
    """Added to all channels, -32..32 of 255."""
    contrast: float = 1.0
    """Factor of all channels, 0.5..1.5."""
    saturation: float = 1.0
    """Factor, 0.5..1.5."""
    hue: int = 0
    """Turn of the colour circle, -18..18 of 180."""
    contrast_last: bool = False
    """Contrast after saturation and hue instead of before."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The image [h,w,3] uint8 RGB with its colours changed, clipped to 0..255 after each step."""
        levels = np.arange(256, dtype=np.float64)
        if self.brightness:
            image = cv2.LUT(image, _table(levels + self.brightness))
        if self.contrast != 1.0 and not self.contrast_last:
            image = cv2.LUT(image, _table(levels * self.contrast))
        if self.saturation != 1.0 or self.hue:
            hue = (np.arange(256) + self.hue) % 180
            saturation, same = _table(levels * self.saturation), levels.astype(np.uint8)
            tables = np.stack([hue.astype(np.uint8), saturation, same], 1)
            hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), tables[None])
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.contrast != 1.0 and self.contrast_last:
            image = cv2.LUT(image, _table(levels * self.contrast))
        return image


def draw_colors(random: np.random.Generator) -> ColorJitter:
    """Each of the four with probability 0.5, uniform in its range. Draws nine numbers in any case."""
    on, amount = random.random(4) < 0.5, random.random(4)
    last = bool(random.random() < 0.5)
    return ColorJitter(
        brightness=float(64 * amount[0] - 32) if on[0] else 0.0,
        contrast=float(0.5 + amount[1]) if on[1] else 1.0,
        saturation=float(0.5 + amount[2]) if on[2] else 1.0,
        hue=int(amount[3] * 37) - 18 if on[3] else 0,
        contrast_last=last,
    )


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)
