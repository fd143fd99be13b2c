"""Post-processing of one image's predictions: instance, panoptic, semantic and general inference.

Mask logits [Q,H/4,W/4] are resized bilinearly twice: to the padded network input (H, W), which is then
cropped to its valid part, and to the original image. Both steps are linear and separable, so together they
are one matrix for the rows and one for the columns (`Sizes.matrices`), with the weights of
`torch.nn.functional.interpolate(align_corners=False)`. Every function here can therefore upsample only what
it needs: the kept queries, and of an instance only the rows and columns that its mask touches.

With several views of an image (scales, flips) the probabilities are averaged pixel by pixel. No gradients
are needed; everything runs on the device of its input. [h,w] is the original image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

_BAND_ELEMENTS = 1 << 24
"""Elements (64 MiB) that the functions that work on bands of rows hold at a time."""


@dataclass(frozen=True)
class Sizes:
    """(height, width) of one image at each stage of inference."""

    padded: tuple[int, int]
    """The network input: H, W."""
    valid: tuple[int, int]
    """The resized image without padding: the upper left part of the input."""
    original: tuple[int, int]
    """The original image: h, w."""

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [h,H/4] and columns [w,W/4] such that rows @ logits @ columns.T are the original's logits."""
        both = (
            _to_original(like.shape[-2 + axis], self.padded[axis], self.valid[axis], self.original[axis])
            for axis in (0, 1)
        )
        rows, columns = (m.to(like.device, like.dtype) for m in both)
        return rows, columns


@dataclass(frozen=True)
class View:
    """The predictions of one forward pass for one image."""

    class_logits: Tensor | None
    """[Q,K+1], the last entry being no-object; None for a per-pixel model."""
    mask_logits: Tensor
    """[Q,H/4,W/4]; for a per-pixel model [K,H/4,W/4] class maps."""
    sizes: Sizes
    flipped: bool = False
    """Whether the network input was flipped horizontally."""

    def class_probabilities(self) -> Tensor:
        """[Q,K+1] float32. `ValueError` for a per-pixel model, which has no queries."""
        if self.class_logits is None:
            raise ValueError("a per-pixel model has no class probabilities of queries")
        return self.class_logits.float().softmax(-1)

    def reordered(self, queries: Tensor) -> View:
        """The view with its queries in the order of the indices `queries` [Q]."""
        class_logits = None if self.class_logits is None else self.class_logits[queries]
        return replace(self, class_logits=class_logits, mask_logits=self.mask_logits[queries])

    def upsampler(self, queries: Tensor | None = None) -> Callable[[slice], Tensor]:
        """A function from a slice of rows of the original image to their mask logits [Q,rows,w] float32.

        `queries` (int64 or bool) selects and orders the queries; None: all.
        """
        logits = (self.mask_logits if queries is None else self.mask_logits[queries]).float()
        rows, columns = self.sizes.matrices(logits)
        if self.flipped:
            columns = columns.flip(0)
        return lambda band: rows[band] @ logits @ columns.T


@dataclass(frozen=True)
class Instance:
    """One object, found by one query. Its mask is False outside the stored crop."""

    label: int
    score: float
    """Class probability x mean foreground mask probability, 0..1."""
    query: int
    crop: Tensor
    """[h',w'] bool: the part of the mask that can be True."""
    top: int
    left: int

    def mask(self, size: tuple[int, int]) -> Tensor:
        """The whole mask, [h,w] bool."""
        full = torch.zeros(size, dtype=torch.bool, device=self.crop.device)
        full[self.top : self.top + self.crop.shape[0], self.left : self.left + self.crop.shape[1]] = self.crop
        return full


@dataclass(frozen=True)
class Panoptic:
    """A panoptic segmentation: `ids` [h,w] int64, 0 void, i the segment `labels[i - 1]`, `scores[i - 1]`."""

    ids: Tensor
    labels: tuple[int, ...]
    scores: tuple[float, ...]


def instance(
    view: View, *, top_k: int = 100, score_threshold: float = 0.0, thing_labels: Set[int] | None = None
) -> Iterator[Instance]:
    """The `top_k` best of all Q x K (query, class) pairs, best class probability first (Mask2Former).

    A pair's score is its class probability times the mean mask probability over the mask's foreground. Pairs
    whose class is not in `thing_labels` are dropped after the top-k selection, as in the official code, and
    so are pairs below `score_threshold` and empty masks. Instances are generated one by one, so that a
    caller can encode each before the next is upsampled. The view must not be flipped.
    """
    probabilities = view.class_probabilities()[:, :-1]
    queries, classes = probabilities.shape
    order = probabilities.flatten().topk(min(top_k, queries * classes))
    labels = (order.indices % classes).tolist()
    chosen = (order.indices // classes).tolist()
    pairs = [
        (query, label, score)
        for query, label, score in zip(chosen, labels, order.values.tolist())
        if score >= score_threshold and (thing_labels is None or label in thing_labels)
    ]  # the mean mask probability is at most 1: a pair below the threshold stays below it
    mask_logits = view.mask_logits.float()
    rows, columns = view.sizes.matrices(mask_logits)
    row_spans, column_spans = _spans(rows), _spans(columns)
    extents = _extents(mask_logits > 0)
    done: dict[int, tuple[Tensor, int, int, float]] = {}
    for query, label, score in pairs:
        if query not in done:
            done[query] = _crop(mask_logits[query], extents[query], rows, columns, row_spans, column_spans)
        crop, top, left, confidence = done[query]
        if confidence > 0 and score * confidence >= score_threshold:
            yield Instance(label, score * confidence, query, crop, top, left)


def panoptic(
    views: Sequence[View],
    *,
    class_confidence: float = 0.8,
    overlap: float = 0.8,
    thing_labels: Set[int],
) -> Panoptic:
    """Assign each pixel to the query with the largest class x mask probability (MaskFormer section 3.4).

    Query q is the same object in all views. Queries whose best class is no-object, or not above
    `class_confidence`, are dropped, and so is a query that is assigned less than `overlap` of the area of
    its own mask (probability >= 0.5): its pixels become void. Segments of one stuff class are merged and
    scored by the best query.
    """
    scores, labels, masks_of = _confident(views, class_confidence)
    count, (height, width) = len(scores), views[0].sizes.original
    ids = torch.zeros(height, width, dtype=torch.int64, device=scores.device)
    if not count:
        return Panoptic(ids, (), ())

    own, won, both = (torch.zeros(count, dtype=torch.int64, device=scores.device) for _ in range(3))
    for band in _bands(height, count * width):
        masks = masks_of(band)
        own += (masks >= 0.5).sum((1, 2))
        best = (masks * scores[:, None, None]).argmax(0)
        inside = masks.gather(0, best[None])[0] >= 0.5
        won += torch.bincount(best.flatten(), minlength=count)
        both += torch.bincount(best[inside], minlength=count)
        ids[band] = torch.where(inside, best + 1, 0)

    holds = ((own > 0) & (both > 0) & (won >= overlap * own)).tolist()
    segment_of = [0] * (count + 1)
    stuff: dict[int, int] = {}
    kept_labels: list[int] = []
    kept_scores: list[float] = []
    for i, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
        if not holds[i]:
            continue
        if label in stuff:
            segment = stuff[label]
            kept_scores[segment - 1] = max(kept_scores[segment - 1], score)
        else:
            kept_labels.append(label)
            kept_scores.append(score)
            segment = len(kept_labels)
            if label not in thing_labels:
                stuff[label] = segment
        segment_of[i + 1] = segment
    ids = torch.tensor(segment_of, device=ids.device)[ids]
    return Panoptic(ids, tuple(kept_labels), tuple(kept_scores))


def general(views: Sequence[View], *, class_confidence: float = 0.3) -> Tensor:
    """The class of each pixel by general inference, [h,w] int64; -1 if all queries are dropped.

    Each pixel is assigned to the query with the largest class x mask probability among those whose best
    class is not no-object and above `class_confidence` (MaskFormer section 3.4 and Table VII).
    """
    scores, labels, masks_of = _confident(views, class_confidence)
    count, (height, width) = len(scores), views[0].sizes.original
    result = torch.full((height, width), -1, dtype=torch.int64, device=scores.device)
    if count:
        for band in _bands(height, count * width):
            result[band] = labels[(masks_of(band) * scores[:, None, None]).argmax(0)]
    return result


def semantic(views: Sequence[View], *, at_original: bool = False) -> Tensor:
    """The class of each pixel, [h,w] int64: argmax of the sum over queries of class x mask probability.

    MaskFormer section 3.4, marginalisation; no-object is left out. The class maps are computed at the size
    of the network input and then resized to the original, as in the official semantic models; `at_original`
    resizes the masks first, as the official panoptic models do for their mIoU. The maps of a per-pixel model
    are class scores already.
    """
    height, width = views[0].sizes.original
    makers = [_class_maps(view, at_original) for view in views]
    labels = torch.empty(height, width, dtype=torch.int64, device=views[0].mask_logits.device)
    for band in _bands(height, max(per_row for _, per_row in makers)):
        maps = makers[0][0](band)
        for make, _ in makers[1:]:
            maps += make(band)
        labels[band] = maps.argmax(0)
    return labels


# --- parts ----------------------------------------------------------------------------------------


def _confident(
    views: Sequence[View], class_confidence: float
) -> tuple[Tensor, Tensor, Callable[[slice], Tensor]]:
    """Scores [n], labels [n] and mask probabilities [n,rows,w] of the queries above `class_confidence`."""
    probabilities = torch.stack([v.class_probabilities() for v in views]).mean(0)
    scores, labels = probabilities.max(-1)
    kept = (labels < probabilities.shape[-1] - 1) & (scores > class_confidence)
    upsamplers = [view.upsampler(kept) for view in views]

    def masks(band: slice) -> Tensor:
        total = upsamplers[0](band).sigmoid()
        for upsampler in upsamplers[1:]:
            total += upsampler(band).sigmoid()
        return total / len(upsamplers)

    return scores[kept], labels[kept], masks


def _class_maps(view: View, at_original: bool) -> tuple[Callable[[slice], Tensor], int]:
    """A function from a slice of the original's rows to class maps [K,rows,w], and its elements per row."""
    upsampled, width = view.upsampler(), view.sizes.original[1]
    if view.class_logits is None:
        return upsampled, len(view.mask_logits) * width
    probabilities = view.class_probabilities()[:, :-1]
    if at_original:
        return lambda band: _marginalise(probabilities, upsampled(band)), max(probabilities.shape) * width

    valid, original = view.sizes.valid, view.sizes.original
    at_input = View(None, view.mask_logits, Sizes(view.sizes.padded, valid, valid)).upsampler()
    rows, columns = (_resizing(valid[axis], original[axis]).to(view.mask_logits.device) for axis in (0, 1))
    if view.flipped:
        columns = columns.flip(0)
    spans = _spans(rows)

    def maps(band: slice) -> Tensor:
        lo, hi = spans[band.start][0], spans[band.stop - 1][1]
        return rows[band, lo:hi] @ _marginalise(probabilities, at_input(slice(lo, hi))) @ columns.T

    rows_per_row = max(1.0, valid[0] / original[0])
    return maps, int(max(probabilities.shape) * max(valid[1], original[1]) * rows_per_row)


def _marginalise(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """[Q,K], [Q,y,x] -> [K,y,x]."""
    return torch.einsum("qk,qyx->kyx", probabilities, mask_logits.sigmoid())


def _resizing(source: int, target: int) -> Tensor:
    """[target,source]: the matrix of a bilinear resize of one axis, which is the resized identity."""
    identity = torch.eye(source)
    if source == target:
        return identity
    return F.interpolate(identity[None, None], (target, source), mode="bilinear", align_corners=False)[0, 0]


def _to_original(source: int, padded: int, valid: int, original: int) -> Tensor:
    """[original,source]: resize to the padded size, crop to the valid one, resize to the original."""
    up = _resizing(source, padded)[:valid]
    return up if valid == original else _resizing(valid, original) @ up


def _spans(matrix: Tensor) -> list[tuple[int, int]]:
    """For each row of a banded matrix the half-open range of its nonzero entries."""
    used = matrix != 0
    first = used.int().argmax(1)
    last = matrix.shape[1] - used.flip(1).int().argmax(1)
    return list(zip(first.tolist(), last.tolist()))


def _extents(masks: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Half-open box (top, bottom, left, right) of each mask [Q,y,x]; None for an empty one."""
    ends = []
    for axis in (2, 1):
        used = masks.any(axis)
        ends += [used.int().argmax(1), used.shape[1] - used.flip(1).int().argmax(1)]
    boxes = torch.stack(ends, 1).tolist()
    return [tuple(box) if some else None for box, some in zip(boxes, masks.flatten(1).any(1).tolist())]


def _crop(
    logits: Tensor,
    extent: tuple[int, int, int, int] | None,
    rows: Tensor,
    columns: Tensor,
    row_spans: list[tuple[int, int]],
    column_spans: list[tuple[int, int]],
) -> tuple[Tensor, int, int, float]:
    """Upsample the part of a mask that can be positive: crop, its top and left, mean foreground probability.

    An upsampled value is a weighted mean of cells: positive only if a cell in its span is positive.
    """
    empty = (torch.zeros((0, 0), dtype=torch.bool, device=logits.device), 0, 0, 0.0)
    if extent is None:
        return empty
    (top, bottom), (left, right) = _touching(row_spans, *extent[:2]), _touching(column_spans, *extent[2:])
    if top == bottom or left == right:  # inside the padding
        return empty
    y0, y1 = row_spans[top][0], row_spans[bottom - 1][1]
    x0, x1 = column_spans[left][0], column_spans[right - 1][1]
    upsampled = rows[top:bottom, y0:y1] @ logits[y0:y1, x0:x1] @ columns[left:right, x0:x1].T
    crop = upsampled > 0
    foreground = upsampled.sigmoid() * crop
    return crop, top, left, float(foreground.sum() / (crop.sum() + 1e-6))


def _touching(spans: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The half-open range of outputs whose span overlaps start..stop; spans ascend."""
    inside = [i for i, (lo, hi) in enumerate(spans) if lo < stop and hi > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _bands(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of rows with at most `_BAND_ELEMENTS` elements each, but at least one row."""
    step = max(1, _BAND_ELEMENTS // max(elements_per_row, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
