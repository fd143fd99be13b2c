"""Drawing: labelled masks on images, images side by side, curves; PNG and JPEG encoding.

Imports numpy, cv2 and matplotlib, but no torch. Images are [h,w,3] uint8 RGB, masks [h,w] bool. Pictures are
limited in size, so that an image of any shape can be drawn.
"""

from __future__ import annotations

import colorsys
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from mpformer.lettering import can_draw, drawable, plot_text, rasterised
from mpformer.types import ClassTable, InputError, distinct_color, printable

Color = tuple[int, int, int]
"""RGB, 0..255."""
_Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels."""

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
_OPACITY = 0.5
"""Of the colour of a mask."""
_FRAME: Color = (230, 30, 30)
_SMALL = 0.5
"""Share of a mask from which on its caption stands beside it, and no other caption on it."""
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
    captions: bool = True,
    framed: Collection[int] = (),
) -> np.ndarray:
    """The image with coloured, outlined masks and a caption "name 0.87" on each; smaller masks on top.

    Objects of one class get different shades of its colour; `framed` ones have a red frame. Captions are
    placed best score first, that of a small object beside it; one that would overlap those before it, or
    cover a small object, is left out. A class whose name no font can draw is "class 3". An image
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
        canvas[inside] = canvas[inside] * (1 - _OPACITY) + np.array(colors[i]) * _OPACITY
        outlines, _ = cv2.findContours(large[i], cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, _blend(colors[i], 255, 0.35), line, cv2.LINE_AA)
    for i in framed:
        _frame(canvas, large[i], line)
    if captions:
        score_of = list(scores) if scores is not None else [None] * len(large)
        order = sorted(range(len(large)), key=lambda i: (score_of[i] or 0.0, areas[i]), reverse=True)
        texts = {
            i: _name(classes, labels[i]) + (f" {score_of[i]:.2f}" if score_of[i] is not None else "")
            for i in order
            if areas[i]
        }
        _captions(canvas, texts, large, colors)
    return canvas


def side_by_side(
    images: Sequence[np.ndarray],
    titles: Sequence[str] = (),
    *,
    columns: int | None = None,
    gap: int = 8,
    longest: int = LONGEST,
) -> np.ndarray:
    """Images on a white background, each below its title, in rows of `columns` (default: one row).

    All are resized to the height of the largest, very wide ones to a limited width, none to a side above
    `longest`, and all of them together to some 30 million pixels. Titles wider than their image are cut.
    """
    longest = min(longest, round((_SHEET / len(images)) ** 0.5))
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
    measured: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Path:
    """Plot curves of (x, y) points to a PNG at `path`, returned; they differ in colour, dash and marker.

    Markers stand on points of the curves or, where these are computed from others, on those `measured`.
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
        marker = "osD^vP*X"[i % 8]
        if measured is None:
            line.set(marker=marker, markersize=5, markevery=every)
        elif own := measured.get(name):
            axes.plot(*zip(*own), color=color, linestyle="", marker=marker, markersize=4, alpha=0.7)
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


def _captions(
    canvas: np.ndarray, texts: Mapping[int, str], masks: Sequence[np.ndarray], colors: Sequence[Color]
) -> None:
    """Captions of masks, the first first; those of small objects beside them."""
    size = max(11, round(min(canvas.shape[:2]) / 38))
    glyphs = {i: _padded(rasterised(text, size)) for i, text in texts.items()}
    small = {i: _extent(masks[i]) for i in texts if glyphs[i].size > _SMALL * int(masks[i].sum())}
    taken: list[_Box] = []
    for i, text in glyphs.items():
        places = _beside(text.shape, small[i]) if i in small else _inside(text.shape, masks[i], canvas.shape)
        _caption(canvas, text, places, colors[i], list(small.values()), taken)


def _padded(glyphs: np.ndarray) -> np.ndarray:
    return np.pad(glyphs, max(2, glyphs.shape[0] // 5))


def _inside(
    shape: tuple[int, ...], mask: np.ndarray, canvas: tuple[int, ...]
) -> Iterator[tuple[float, float]]:
    """(top, left) of a caption of that shape at the innermost point of a mask, and near it."""
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
    cy, cx = np.unravel_index(int(depth.argmax()), depth.shape)
    steps = [(0, 0)] + [(dy, dx) for r in (1, 2, 3) for dy, dx in ((-r, 0), (r, 0), (0, -r / 2), (0, r / 2))]
    for dy, dx in steps:
        top = min(max(cy - shape[0] / 2 + dy * shape[0], 0), canvas[0] - shape[0])
        yield top, min(max(cx - shape[1] / 2 + dx * shape[1], 0), canvas[1] - shape[1])


def _beside(shape: tuple[int, ...], box: _Box) -> Iterator[tuple[float, float]]:
    """(top, left) of a caption of that shape above, below, right and left of a box; then further away."""
    top, left, bottom, right = box
    height, width = shape[:2]
    for gap in (2, height, 2 * height):
        for shift in (-0.5, 0.0, -1.0):
            across = (left + right) / 2 + shift * width
            yield top - gap - height, across
            yield bottom + gap, across
        yield (top + bottom - height) / 2, right + gap
        yield (top + bottom - height) / 2, left - gap - width


def _extent(mask: np.ndarray) -> _Box:
    """The box around a mask that has a pixel."""
    left, top, width, height = cv2.boundingRect(mask)
    return top, left, top + height, left + width


def _frame(canvas: np.ndarray, mask: np.ndarray, line: int) -> None:
    """A red frame on a white one around a mask, if it has a pixel."""
    if not mask.any():
        return
    top, left, bottom, right = _extent(mask)
    corners = (left - 2 * line, top - 2 * line), (right + 2 * line - 1, bottom + 2 * line - 1)
    first, last = (
        (min(max(x, 0), canvas.shape[1] - 1), min(max(y, 0), canvas.shape[0] - 1)) for x, y in corners
    )
    cv2.rectangle(canvas, first, last, (255, 255, 255), 4 * line)
    cv2.rectangle(canvas, first, last, _FRAME, 2 * line)


def _caption(
    canvas: np.ndarray,
    glyphs: np.ndarray,
    places: Iterator[tuple[float, float]],
    color: Color,
    clear: Sequence[_Box],
    taken: list[_Box],
) -> None:
    """White text on a dark box edged in `color` at the first place that is free; `taken` gains its box.

    Free is what lies on the canvas and overlaps none of the boxes in `taken` and in `clear`.
    """
    height, width = glyphs.shape
    for at_y, at_x in places:
        top, left = round(at_y), round(at_x)
        box = (top, left, top + height, left + width)
        outside = top < 0 or left < 0 or box[2] > canvas.shape[0] or box[3] > canvas.shape[1]
        if not outside and not any(_overlap(box, other) for other in (*taken, *clear)):
            break
    else:
        return
    taken.append(box)
    region = canvas[top : top + height, left : left + width]
    region[:] = region * 0.25 + np.array(_blend(color, 0, 0.8)) * 0.75
    cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), color, 1)
    alpha = glyphs[..., None] / 255
    region[:] = region * (1 - alpha) + 255 * alpha


def _overlap(a: _Box, b: _Box) -> bool:
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
