"""From one image's predictions to results: instance, panoptic and semantic inference.

Mask logits [Q,H/4,W/4] pass through two bilinear resizings with a crop between them: to the padded network
input (H, W), cut to its valid part, to the original image. Both are linear and separable, so together they
are one matrix for the rows and one for the columns (`Sizes.matrices`), with the very weights of
`torch.nn.functional.interpolate(align_corners=False)`. That lets every function here upsample only what it
needs: the kept queries, and of an instance only the rows and columns that its mask touches.

Nothing here needs gradients; everything runs on the device of its input. [h,w] is the original image.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BAND_ELEMENTS = 1 << 24  # numbers held at once by the functions that walk over bands of rows: 64 MiB


@dataclass(frozen=True)
class Sizes:
    """(height, width) of one image on its way through the network."""

    padded: tuple[int, int]
    """The network input: H, W."""
    valid: tuple[int, int]
    """The resized image without padding: the upper left part of the input."""
    original: tuple[int, int]
    """The image as it came: h, w."""

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [h,H/4] and columns [w,W/4] such that rows @ logits @ columns.T are logits of the original."""
        both = (
            _to_original(like.shape[-2 + axis], self.padded[axis], self.valid[axis], self.original[axis])
            for axis in (0, 1)
        )
        rows, columns = (m.to(like.device, like.dtype) for m in both)
        return rows, columns


@dataclass(frozen=True)
class Instance:
    """One object found by one query. Its mask is False outside the crop that is held."""

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
    """A partition of the image: `ids` [h,w] int64, 0 void, i the segment `labels[i - 1]`, `scores[i - 1]`."""

    ids: Tensor
    labels: tuple[int, ...]
    scores: tuple[float, ...]


def instance(
    class_logits: Tensor,
    mask_logits: Tensor,
    sizes: Sizes,
    *,
    top_k: int = 100,
    score_threshold: float = 0.0,
    thing_labels: Set[int] | None = None,
) -> Iterator[Instance]:
    """The `top_k` best of all Q x K (query, class) pairs, best class probability first (Mask2Former).

    `class_logits` [Q,K+1], `mask_logits` [Q,H/4,W/4]. A pair's score is its class probability times the
    mean mask probability over the mask's foreground. Pairs of a class that is not in `thing_labels` are
    dropped after the top k were chosen, as in the official code; so are pairs below `score_threshold`.
    An empty mask is no instance. Instances come one by one, so that a caller can encode one before the next
    one is upsampled.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    queries, classes = probabilities.shape
    order = probabilities.flatten().topk(min(top_k, queries * classes))
    labels = (order.indices % classes).tolist()
    chosen = (order.indices // classes).tolist()
    pairs = [
        (query, label, score)
        for query, label, score in zip(chosen, labels, order.values.tolist())
        if score >= score_threshold and (thing_labels is None or label in thing_labels)
    ]  # the mask's factor is at most 1: a pair below the threshold stays below it
    rows, columns = sizes.matrices(mask_logits := mask_logits.float())
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
    class_logits: Tensor,
    mask_logits: Tensor,
    sizes: Sizes,
    *,
    class_confidence: float = 0.8,
    overlap: float = 0.8,
    thing_labels: Set[int],
) -> Panoptic:
    """Each pixel to the query with the largest class probability x mask probability (MaskFormer section 3.4).

    `class_logits` [Q,K+1], `mask_logits` [Q,H/4,W/4]. Queries whose best class is no-object, or below
    `class_confidence`, take no part; a query that wins less than `overlap` of the area of its own mask
    (probability >= 0.5) is dropped, its pixels stay void. Segments of one stuff class are one segment,
    scored by its best query.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = (labels < class_logits.shape[-1] - 1) & (scores > class_confidence)
    scores, labels = scores[kept], labels[kept]
    count = len(scores)
    ids = torch.zeros(sizes.original, dtype=torch.int64, device=mask_logits.device)
    if not count:
        return Panoptic(ids, (), ())

    logits = mask_logits[kept].float()
    rows, columns = sizes.matrices(logits)
    own, won, both = (torch.zeros(count, dtype=torch.int64, device=logits.device) for _ in range(3))
    for band in _bands(len(rows), count * len(columns)):
        upsampled = rows[band] @ logits @ columns.T
        own += (upsampled >= 0).sum((1, 2))
        best = (upsampled.sigmoid() * scores[:, None, None]).argmax(0)
        inside = upsampled.gather(0, best[None])[0] >= 0
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


def semantic(
    class_logits: Tensor | None,
    mask_logits: Tensor,
    sizes: Sizes,
    *,
    at_original: bool = False,
) -> Tensor:
    """The class of each pixel, [h,w] int64: argmax of sum over queries of class x mask probability.

    `class_logits` [Q,K+1] without its no-object entry, `mask_logits` [Q,H/4,W/4] (MaskFormer section 3.4,
    marginalisation). The class maps are summed at the size of the network input and then resized to the
    original, as the official semantic models do; `at_original` resizes the masks first and sums there, as
    the official panoptic models do for their mIoU. A per-pixel model has `class_logits` None, and
    `mask_logits` [K,H/4,W/4] are its class maps.
    """
    mask_logits = mask_logits.float()
    rows, columns = sizes.matrices(mask_logits)
    if class_logits is None:
        count = len(mask_logits)
    else:
        probabilities = class_logits.float().softmax(-1)[:, :-1]
        count = max(probabilities.shape)
    if class_logits is not None and not at_original:
        return _semantic_at_input(probabilities, mask_logits, sizes)
    labels = torch.empty(sizes.original, dtype=torch.int64, device=mask_logits.device)
    for band in _bands(len(rows), count * len(columns)):
        maps = rows[band] @ mask_logits @ columns.T
        if class_logits is not None:
            maps = _marginalise(probabilities, maps)
        labels[band] = maps.argmax(0)
    return labels


def _semantic_at_input(probabilities: Tensor, mask_logits: Tensor, sizes: Sizes) -> Tensor:
    to_valid = Sizes(sizes.padded, sizes.valid, sizes.valid)
    rows, columns = to_valid.matrices(mask_logits)
    last_rows, last_columns = (
        _resizing(sizes.valid[axis], sizes.original[axis]).to(mask_logits) for axis in (0, 1)
    )
    spans = _spans(last_rows)
    labels = torch.empty(sizes.original, dtype=torch.int64, device=mask_logits.device)
    widest = max(sizes.valid[1], sizes.original[1])
    per_row = max(probabilities.shape) * widest * max(1.0, sizes.valid[0] / sizes.original[0])
    for band in _bands(len(last_rows), int(per_row)):
        lo, hi = spans[band.start][0], spans[band.stop - 1][1]
        maps = _marginalise(probabilities, rows[lo:hi] @ mask_logits @ columns.T)
        labels[band] = (last_rows[band, lo:hi] @ maps @ last_columns.T).argmax(0)
    return labels


def _marginalise(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """[Q,K], [Q,y,x] -> [K,y,x]."""
    return torch.einsum("qk,qyx->kyx", probabilities, mask_logits.sigmoid())


def _resizing(source: int, target: int) -> Tensor:
    """[target,source]: the matrix of a bilinear resize of one axis is the resize of the identity."""
    identity = torch.eye(source)
    if source == target:
        return identity
    return F.interpolate(identity[None, None], (target, source), mode="bilinear", align_corners=False)[0, 0]


def _to_original(source: int, padded: int, valid: int, original: int) -> Tensor:
    """[original,source]: up to the padded size, cut, to the original size."""
    up = _resizing(source, padded)[:valid]
    return up if valid == original else _resizing(valid, original) @ up


def _spans(matrix: Tensor) -> list[tuple[int, int]]:
    """For each row of a banded matrix the half-open range of its entries other than 0."""
    used = matrix != 0
    first = used.int().argmax(1)
    last = matrix.shape[1] - used.flip(1).int().argmax(1)
    return list(zip(first.tolist(), last.tolist()))


def _extents(masks: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Of each mask [Q,y,x] the half-open box (top, bottom, left, right); None where it is empty."""
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

    An upsampled value is a mean of cells, so it is positive only where a positive cell lies in its span.
    """
    nothing = (torch.zeros((0, 0), dtype=torch.bool, device=logits.device), 0, 0, 0.0)
    if extent is None:
        return nothing
    (top, bottom), (left, right) = _reach(row_spans, *extent[:2]), _reach(column_spans, *extent[2:])
    if top == bottom or left == right:  # lies in the padding
        return nothing
    y0, y1 = row_spans[top][0], row_spans[bottom - 1][1]
    x0, x1 = column_spans[left][0], column_spans[right - 1][1]
    upsampled = rows[top:bottom, y0:y1] @ logits[y0:y1, x0:x1] @ columns[left:right, x0:x1].T
    crop = upsampled > 0
    foreground = upsampled.sigmoid() * crop
    return crop, top, left, float(foreground.sum() / (crop.sum() + 1e-6))


def _reach(spans: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The half-open range of outputs whose span meets start..stop; spans ascend."""
    inside = [i for i, (lo, hi) in enumerate(spans) if lo < stop and hi > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _bands(rows: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, _BAND_ELEMENTS // max(elements_per_row, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
