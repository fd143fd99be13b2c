"""Drawing: labelled masks on images, images side by side, curves; PNG and JPEG encoding.

Imports numpy, cv2 and matplotlib, but no torch. Images are [h,w,3] uint8 RGB, masks [h,w] bool. Pictures are
limited in size, so that an image of any shape can be drawn.
"""

from __future__ import annotations

import colorsys
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from mpformer.lettering import can_draw, drawable, plot_text, rasterised
from mpformer.types import ClassTable, InputError, distinct_color, printable

Color = tuple[int, int, int]
"""RGB, 0..255."""

_Made = TypeVar("_Made")
_FAULTS = (
    cv2.error,
    InputError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

LONGEST = 8192
"""Pixels of a picture's longer side; larger images are drawn smaller."""

_MIN_SIDE = 480
"""Images with a smaller short side are enlarged by an integer factor, so that labels are readable."""
_MOST_ENLARGED = 2048
"""Pixels of the longer side up to which they are."""
_SHEET = 1 << 25
"""Pixels of images side by side, about."""
_LONGEST_TITLE = 200
"""Characters."""
_JPEG_SIDE = 65_500
"""Pixels of a side of a JPEG."""


def attempted(make: Callable[[], _Made], what: str) -> _Made | None:
    """What `make` draws; None, and one line of warning that begins with `what`, where that fails.

    For pictures that come with a result: a run or a command that has its figures does not end for them.
    """
    try:
        return make()
    except _FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        logging.getLogger(__name__).warning("%s: left out: %s", printable(what), reason)
        return None


def encode_png(image: np.ndarray) -> bytes:
    """PNG of an RGB image [h,w,3] uint8, or of a map [h,w] uint8 or uint16. `ValueError` for other arrays."""
    swapped = image[..., ::-1] if image.ndim == 3 else image
    done, data = cv2.imencode(".png", np.ascontiguousarray(swapped), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise ValueError(f"an array of {image.shape} {image.dtype} cannot be encoded as PNG")
    return data.tobytes()


def decode_png(data: bytes) -> np.ndarray:
    """The array that `encode_png` encoded, exactly. `ValueError` for other data."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("not a PNG image")
    return np.ascontiguousarray(image[..., ::-1]) if image.ndim == 3 else image


def encode_jpeg(image: np.ndarray, quality: int = 88) -> bytes:
    """JPEG of an RGB image [h,w,3] uint8, reduced if a side is above 65,500. `ValueError` for others."""
    if max(image.shape) > _JPEG_SIDE:
        size = fitted(image.shape[0], image.shape[1], _JPEG_SIDE)
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    swapped = np.ascontiguousarray(image[..., ::-1])
    done, data = cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"an array of {image.shape} {image.dtype} cannot be encoded as JPEG")
    return data.tobytes()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image or a map as PNG; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


def fitted(height: int, width: int, longest: int = LONGEST) -> tuple[int, int]:
    """(height, width) of an image reduced until its longer side is at most `longest`; each at least 1."""
    share = min(1.0, longest / max(height, width))
    return max(1, round(height * share)), max(1, round(width * share))


def class_color(classes: ClassTable, label: int) -> Color:
    """The colour of a class; a generated one if the table has none (black)."""
    return color if any(color := classes.classes[label].color) else distinct_color(label)


def overlay(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    labels: Sequence[int],
    classes: ClassTable,
    scores: Sequence[float | None] | None = None,
    *,
    opacity: float = 0.5,
    captions: bool = True,
) -> np.ndarray:
    """The image with coloured, outlined masks and a caption "name 0.87" on each; smaller masks on top.

    Objects of one class get different shades of its colour. Captions are placed best score first; one that
    would overlap those before it is left out. A class whose name no font can draw is "class 3". An image
    whose short side is below 480 is enlarged by an integer factor, to at most 2048; one whose long side is
    above 8192 is reduced. Masks may have another size than the image.
    """
    height, width = image.shape[:2]
    factor = max(1, min(-(-_MIN_SIDE // min(height, width)), _MOST_ENLARGED // max(height, width)))
    size = fitted(height * factor, width * factor)[::-1]
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA)
    if canvas.ndim == 2:
        canvas = cv2.cvtColor(canvas, cv2.COLOR_GRAY2RGB)
    line = max(1, round(min(size) / 320))
    large = [cv2.resize(np.asarray(m).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for m in masks]
    colors = _shades(labels, classes)
    areas = [int(m.sum()) for m in large]

    for i in sorted(range(len(large)), key=lambda i: -areas[i]):
        if not areas[i]:
            continue
        inside = large[i] > 0
        canvas[inside] = canvas[inside] * (1 - opacity) + np.array(colors[i]) * opacity
        outlines, _ = cv2.findContours(large[i], cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, _blend(colors[i], 255, 0.35), line, cv2.LINE_AA)
    if captions:
        score_of = list(scores) if scores is not None else [None] * len(large)
        taken: list[tuple[int, int, int, int]] = []
        for i in sorted(range(len(large)), key=lambda i: (score_of[i] or 0.0, areas[i]), reverse=True):
            if not areas[i]:
                continue
            text = _name(classes, labels[i]) + (f" {score_of[i]:.2f}" if score_of[i] is not None else "")
            _caption(canvas, text, large[i], colors[i], taken)
    return canvas


def side_by_side(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), *, columns: int | None = None, gap: int = 8
) -> np.ndarray:
    """Images on a white background, each below its title, in rows of `columns` (default: one row).

    All are resized to the height of the largest, very wide ones to a limited width, and all of them together
    to some 30 million pixels. Titles wider than their image are shortened.
    """
    longest = round((_SHEET / len(images)) ** 0.5)
    height = min(longest, max(i.shape[0] for i in images))
    tiles = []
    for i, image in enumerate(images):
        tile = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
        share = min(height / tile.shape[0], longest / tile.shape[1])
        size = (max(1, round(tile.shape[1] * share)), max(1, round(tile.shape[0] * share)))
        if size != tile.shape[1::-1]:
            how = cv2.INTER_AREA if share < 1 else cv2.INTER_CUBIC
            tile = cv2.resize(tile, size, interpolation=how)
        tile = np.pad(tile, ((0, height - size[1]), (0, 0), (0, 0)), constant_values=255)
        tiles.append(np.vstack([_title(titles[i], tile.shape[1], height), tile]) if titles else tile)
    per_row = columns or len(tiles)
    cell_width = max(t.shape[1] for t in tiles)
    rows = []
    for start in range(0, len(tiles), per_row):
        row = tiles[start : start + per_row]
        if len(tiles) > per_row:  # a grid has cells of one width
            row = [
                np.pad(t, ((0, 0), (0, cell_width - t.shape[1]), (0, 0)), constant_values=255) for t in row
            ]
        gaps = np.full((row[0].shape[0], gap, 3), 255, np.uint8)
        rows.append(np.hstack([part for tile in row for part in (tile, gaps)][:-1]))
    widest = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, gap), (0, widest - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    return np.vstack(rows)[:-gap]


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    path: Path,
    *,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Path:
    """Plot curves of (x, y) points to a PNG at `path`, returned; they differ in colour, dash and marker.

    `bands` shades (x, low, high) around the curve of the same name. A series without points still has an
    entry in the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
    dashes = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
    lines = []
    for i, (name, points) in enumerate(series.items()):
        color = colors[i % len(colors)]
        x, y = zip(*points) if points else ((), ())
        every = max(1, len(x) // 12)
        [line] = axes.plot(x, y, color=color, linestyle=dashes[i % len(dashes)], linewidth=1.8)
        lines.append(line)
        line.set(marker="osD^vP*X"[i % 8], markersize=5, markevery=every)
        if bands and bands.get(name):
            bx, low, high = zip(*bands[name])
            axes.fill_between(bx, low, high, color=color, alpha=0.16, linewidth=0)
    # names are no formulas: a "$" in one is a dollar
    axes.set_xlabel(plot_text(xlabel), parse_math=False)
    axes.set_ylabel(plot_text(ylabel), parse_math=False)
    axes.set_title(plot_text(title), fontsize=11, parse_math=False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if series:
        legend = axes.legend(lines, [" "] * len(lines), frameon=False, fontsize=9)
        for entry, name in zip(legend.get_texts(), series):  # a label that begins with "_" would be left out
            entry.set(text=plot_text(name), parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


# --- parts ----------------------------------------------------------------------------------------


def _name(classes: ClassTable, label: int) -> str:
    """The name of a class; its number where it is empty, or no font can draw it."""
    name = printable(classes.names[label])[:_LONGEST_TITLE]
    return name if name.strip() and can_draw(name) else f"class {label}"


def _shades(labels: Sequence[int], classes: ClassTable) -> list[Color]:
    """A colour per object: the class's own for its first, with other hue and brightness for the others."""
    seen: Counter[int] = Counter()
    shades: list[Color] = []
    for label in labels:
        n = seen[label]
        seen[label] += 1
        color = class_color(classes, label)
        if n:
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
            turn = 0.06 * ((n + 1) // 2) * (1 if n % 2 else -1)
            s, v = max(0.35, s - 0.1 * (n % 3)), max(0.5, v - 0.12 * (n % 4))
            red, green, blue = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            color = (round(red * 255), round(green * 255), round(blue * 255))
        shades.append(color)
    return shades


def _blend(color: Color, grey: int, share: float) -> Color:
    """The colour mixed with a grey value."""
    red, green, blue = (round(c * (1 - share) + grey * share) for c in color)
    return red, green, blue


def _caption(
    canvas: np.ndarray,
    text: str,
    mask: np.ndarray,
    color: Color,
    taken: list[tuple[int, int, int, int]],
) -> None:
    """White text on a dark box edged in `color`, near the mask's innermost point; `taken` gains its box.

    Drawn only where it overlaps none of the boxes in `taken`.
    """
    glyphs = rasterised(text, max(11, round(min(canvas.shape[:2]) / 38)))
    pad = max(2, glyphs.shape[0] // 5)
    height, width = glyphs.shape[0] + 2 * pad, glyphs.shape[1] + 2 * pad
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
    cy, cx = np.unravel_index(int(depth.argmax()), depth.shape)
    steps = [(0, 0)] + [(dy, dx) for r in (1, 2, 3) for dy, dx in ((-r, 0), (r, 0), (0, -r / 2), (0, r / 2))]
    for dy, dx in steps:
        top = round(min(max(cy - height / 2 + dy * height, 0), canvas.shape[0] - height))
        left = round(min(max(cx - width / 2 + dx * width, 0), canvas.shape[1] - width))
        box = (top, left, top + height, left + width)
        if top < 0 or left < 0:
            return  # larger than the image
        if not any(_overlap(box, other) for other in taken):
            break
    else:
        return
    taken.append(box)
    region = canvas[top : top + height, left : left + width]
    region[:] = region * 0.25 + np.array(_blend(color, 0, 0.8)) * 0.75
    cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), color, 1)
    inner = region[pad : pad + glyphs.shape[0], pad : pad + glyphs.shape[1]]
    alpha = glyphs[..., None] / 255
    inner[:] = inner * (1 - alpha) + 255 * alpha


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _title(text: str, width: int, image_height: int) -> np.ndarray:
    """A white strip [h,width,3] with black text."""
    text = drawable(text)[:_LONGEST_TITLE]
    size = max(12, round(image_height / 30))
    strip = np.full((round(size * 2), width, 3), 255, np.uint8)
    glyphs = rasterised(text, size)
    while glyphs.shape[1] > width - 4 and len(text) > 1:
        fits = len(text) * max(0, width - 4) // glyphs.shape[1]  # about
        text = text[: max(0, min(len(text) - 2, fits))] + "…"
        glyphs = rasterised(text, size)
    glyphs = glyphs[: strip.shape[0], : max(0, width - 4)]
    top = (strip.shape[0] - glyphs.shape[0]) // 2
    area = strip[top : top + glyphs.shape[0], 2 : 2 + glyphs.shape[1]]
    area[:] = 255 - glyphs[..., None]
    return strip
