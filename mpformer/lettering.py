"""Text as pixels, in any script for which there is a font, without warnings about those that are missing.

Fonts are tried in this order for each character: DejaVu Sans, which ships with matplotlib (Latin, Greek,
Cyrillic, Arabic, Hebrew, Armenian, Georgian); the Unicode font inside OpenCV 5 (Chinese, Japanese, Korean);
and those of the system. Where none has a character, `can_draw` says so before anything is drawn.
"""

from __future__ import annotations

import functools
import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from mpformer.types import printable

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

_OPENCV = "opencv"
"""Stands for OpenCV's font, which is no file, among the paths of fonts."""
_LONGEST_LABEL = 90
"""Characters of a label of a plot; longer ones leave no room for the axes."""
_MOST_FONTS = 400
"""Files of fonts that are searched for a character."""


def can_draw(text: str) -> bool:
    """Whether some font has every character of the text."""
    return all(_font_of(character) is not None for character in printable(text))


def drawable(text: str) -> str:
    """The text with what no font has, and control characters, as escapes such as `\\u0939`."""
    return "".join(c if _font_of(c) is not None else _escaped(c) for c in printable(text))


def plot_text(text: str) -> str:
    """The text for a label of a plot: shortened, all that matplotlib's own font lacks as escapes."""
    shown = "".join(c if c in _glyphs(_dejavu()) else _escaped(c) for c in printable(text))
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"


def rasterised(text: str, pixels: int) -> np.ndarray:
    """Coverage [h,w] uint8 of a line of text with a font size of `pixels`; `drawable` is applied to it."""
    runs = itertools.groupby(drawable(text) or " ", key=_font_of)
    parts = [_run("".join(characters), font or _dejavu(), pixels) for font, characters in runs]
    above = max(baseline for _, baseline in parts)
    below = max(image.shape[0] - baseline for image, baseline in parts)
    aligned = [
        np.pad(image, ((above - baseline, below - image.shape[0] + baseline), (0, 0)))
        for image, baseline in parts
    ]
    return np.hstack(aligned)


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


# --- which font -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _font_of(character: str) -> str | None:
    """The path of the first font that has the character, or `_OPENCV`; None without one."""
    if character in _glyphs(_dejavu()):
        return _dejavu()
    if _opencv_has(character):
        return _OPENCV
    return next((path for path in _system_fonts() if character in _glyphs(path)), None)


@functools.cache
def _dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.lru_cache(maxsize=_MOST_FONTS + 1)
def _glyphs(path: str) -> frozenset[str]:
    """The characters of a font; none of a file that cannot be read, or that holds pictures, as emoji do."""
    try:
        font = _open(path)
    except RuntimeError:
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    """Files of the fonts installed here, those made for many scripts first."""
    from matplotlib.font_manager import findSystemFonts

    found = sorted(findSystemFonts(), key=lambda path: ("noto" not in path.lower(), path))
    return tuple(path for path in found if "emoji" not in path.lower())[:_MOST_FONTS]


@functools.cache
def _opencv_font() -> Any | None:
    """OpenCV's Unicode font; None before OpenCV 5, or where it was built without."""
    kind = getattr(cv2, "FontFace", None)
    return None if kind is None else kind("uni")


def _opencv_has(character: str) -> bool:
    """Whether OpenCV draws the character; it puts a question mark in the place of one that it lacks."""
    if _opencv_font() is None or character.isspace():
        return False
    drawn, _ = _opencv_run(character, 16)
    return bool(drawn.any()) and not np.array_equal(drawn, _opencv_run("?", 16)[0])


# --- pixels ---------------------------------------------------------------------------------------


def _run(text: str, font: str, pixels: int) -> tuple[np.ndarray, int]:
    """Coverage [h,w] uint8 of characters of one font, and the row of their baseline."""
    if font == _OPENCV:
        return _opencv_run(text, pixels)
    face = _open(font)
    face.set_size(pixels, 72)
    face.set_text(text, 0.0)
    face.draw_glyphs_to_bitmap(antialiased=True)
    image = np.array(face.get_image())
    return image, image.shape[0] - round(face.get_descent() / 64)


def _opencv_run(text: str, pixels: int) -> tuple[np.ndarray, int]:
    baseline = round(1.2 * pixels)
    canvas = np.zeros((round(1.7 * pixels), pixels * (len(text) + 1)), np.uint8)
    put: Any = cv2.putText  # cv2's types know the signature for fonts only from version 5 on
    end, _ = put(canvas, text, (0, baseline), 255, _opencv_font(), pixels)
    rows = np.flatnonzero(canvas.any(1))
    if not len(rows):
        return canvas[baseline - 1 : baseline, : max(1, end[0])], 1
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return canvas[top:bottom, : max(1, min(int(end[0]), canvas.shape[1]))], baseline - top


@functools.lru_cache(maxsize=8)
def _open(path: str) -> FT2Font:
    from matplotlib.ft2font import FT2Font

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return FT2Font(path)
