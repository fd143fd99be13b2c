"""Post-processing of one image's predictions: instance, panoptic, semantic and general inference.

Mask logits [Q,H/4,W/4] are resized bilinearly twice: to the padded network input (H, W), which is then
cropped to its valid part, and to the original image. Both steps together are one matrix for the rows and one
for the columns (`resizing`). Every function here can therefore upsample only what it needs: the kept queries,
and of an instance only the rows and columns that its mask touches. Full maps are made in bands of rows, which
on CPUs stay in the cache; a band is stored row by row, [rows,n,w].

With several views of an image (scales, flips) the probabilities are averaged pixel by pixel. No gradients
are needed; everything runs on the device of its input. [h,w] is the original image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpformer.evaluate.resizing import Resizing, bilinear, blocks, resized, to_original

_CPU_ELEMENTS = 1 << 20
"""Elements of a band on CPUs (4 MiB)."""
_GPU_ELEMENTS = 1 << 24
"""Elements of a band elsewhere (64 MiB)."""


@dataclass(frozen=True)
class Sizes:
    """(height, width) of one image at each stage of inference."""

    padded: tuple[int, int]
    """The network input: H, W."""
    valid: tuple[int, int]
    """The resized image without padding: the upper left part of the input."""
    original: tuple[int, int]
    """The original image: h, w."""

    def resizings(self, maps: Tensor, flipped: bool = False) -> tuple[Resizing, Resizing]:
        """From maps [..,H/4,W/4] to the original's rows and columns, the latter in reverse if `flipped`."""
        axes = zip(maps.shape[-2:], self.padded, self.valid, self.original)
        rows, columns = (to_original(*edges) for edges in axes)
        device = maps.device
        return Resizing(rows, device), Resizing(columns, device, flipped)


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
        return self.class_logits.detach().float().softmax(-1)

    def reordered(self, queries: Tensor) -> View:
        """The view with its queries in the order of the indices `queries` [Q]."""
        class_logits = None if self.class_logits is None else self.class_logits[queries]
        return replace(self, class_logits=class_logits, mask_logits=self.mask_logits[queries])

    def upsampler(self, queries: Tensor | None = None) -> Callable[[slice], Tensor]:
        """A function from a slice of rows of the original image to their mask logits [rows,Q,w] float32.

        `queries` (int64 or bool) selects and orders the queries; None: all.
        """
        logits = self.mask_logits.detach().transpose(0, 1)
        logits = (logits if queries is None else logits[:, queries]).float().contiguous()
        rows, columns = self.sizes.resizings(self.mask_logits, self.flipped)
        width = slice(0, self.sizes.original[1])
        used = columns.sources(width)
        return lambda band: resized(logits[rows.sources(band), :, used], rows, band, columns, width)


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
    mask_logits = view.mask_logits.detach()
    rows, columns = view.sizes.resizings(mask_logits)
    extents = _extents(mask_logits)
    done: dict[int, tuple[Tensor, int, int, float]] = {}
    for query, label, score in pairs:
        if query not in done:
            done[query] = _crop(mask_logits[query].float(), extents[query], rows, columns)
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
    best = torch.zeros(height, width, dtype=torch.int64, device=scores.device)
    if not count:
        return Panoptic(best, (), ())

    own = torch.zeros(count, dtype=torch.int64, device=scores.device)
    inside = torch.zeros(height, width, dtype=torch.bool, device=scores.device)
    for band in _bands(height, count * width, scores.device):
        masks = masks_of(band)
        above = masks >= 0.5
        own += above.sum((0, 2), dtype=torch.int32)  # int64 sums take longer
        best[band] = _argmax(masks.mul_(scores[:, None]))
        inside[band] = above.gather(1, best[band, None])[:, 0]
    won = torch.bincount(best.flatten(), minlength=count)
    both = torch.bincount(best[inside], minlength=count)
    ids = torch.where(inside, best + 1, 0)

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
        for band in _bands(height, count * width, scores.device):
            result[band] = labels[_argmax(masks_of(band).mul_(scores[:, None]))]
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
    device = views[0].mask_logits.device
    labels = torch.empty(height, width, dtype=torch.int64, device=device)
    for band in _bands(height, max(per_row for _, per_row in makers), device):
        maps = makers[0][0](band)
        for make, _ in makers[1:]:
            maps += make(band)
        labels[band] = _argmax(maps)
    return labels


# --- parts ----------------------------------------------------------------------------------------


def _confident(
    views: Sequence[View], class_confidence: float
) -> tuple[Tensor, Tensor, Callable[[slice], Tensor]]:
    """Scores [n], labels [n] and mask probabilities [rows,n,w] of the queries above `class_confidence`."""
    probabilities = torch.stack([v.class_probabilities() for v in views]).mean(0)
    scores, labels = probabilities.max(-1)
    kept = (labels < probabilities.shape[-1] - 1) & (scores > class_confidence)
    upsamplers = [view.upsampler(kept) for view in views]

    def masks(band: slice) -> Tensor:
        total = upsamplers[0](band).sigmoid_()
        for upsampler in upsamplers[1:]:
            total += upsampler(band).sigmoid_()
        return total.div_(len(upsamplers))

    return scores[kept], labels[kept], masks


def _class_maps(view: View, at_original: bool) -> tuple[Callable[[slice], Tensor], int]:
    """A function from a slice of the original's rows to class maps [rows,K,w], and its elements per row."""
    upsampled, (height, width) = view.upsampler(), view.sizes.original
    if view.class_logits is None:
        return upsampled, len(view.mask_logits) * width
    probabilities = view.class_probabilities()[:, :-1]
    valid = view.sizes.valid
    if at_original or valid == (height, width):
        return lambda band: _marginalise(probabilities, upsampled(band)), max(probabilities.shape) * width

    at_input = View(None, view.mask_logits, Sizes(view.sizes.padded, valid, valid)).upsampler()
    device = view.mask_logits.device
    rows = Resizing(bilinear(valid[0], height), device)
    columns = Resizing(bilinear(valid[1], width), device, view.flipped)
    used = columns.sources(slice(0, width))

    def maps(band: slice) -> Tensor:
        scores = _marginalise(probabilities, at_input(rows.sources(band)))
        return resized(scores[:, :, used], rows, band, columns, slice(0, width))

    rows_per_row = max(1.0, valid[0] / height)
    return maps, int(max(probabilities.shape) * max(valid[1], width) * rows_per_row)


def _marginalise(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """[Q,K], [rows,Q,w] -> [rows,K,w]. Overwrites the logits."""
    return probabilities.T @ mask_logits.sigmoid_()


def _argmax(maps: Tensor) -> Tensor:
    """[rows,n,w] -> [rows,w], of equal maps the first. On CPUs `max` takes half the time of `argmax`."""
    return maps.max(1).indices


def _extents(mask_logits: Tensor) -> list[tuple[slice, slice] | None]:
    """Rows and columns of the box of the positive cells of each map [Q,y,x]; None where there are none."""
    positive = (mask_logits > 0).view(torch.uint8)  # `amax` of bytes takes a tenth of the time of `any`
    ends = []
    for axis in (2, 1):
        used = positive.amax(axis)
        ends += [used.int().argmax(1), used.shape[1] - used.flip(1).int().argmax(1)]
    boxes = torch.stack([*ends, used.amax(1)], 1).tolist()  # one wait for a GPU
    return [(slice(y0, y1), slice(x0, x1)) if some else None for y0, y1, x0, x1, some in boxes]


def _crop(
    logits: Tensor, extent: tuple[slice, slice] | None, rows: Resizing, columns: Resizing
) -> tuple[Tensor, int, int, float]:
    """Upsample the part of a mask that can be positive: crop, its top and left, mean foreground probability.

    An upsampled value is a weighted mean of cells: positive only if a cell that it depends on is positive.
    """
    empty = (torch.zeros((0, 0), dtype=torch.bool, device=logits.device), 0, 0, 0.0)
    if extent is None:
        return empty
    top, left = rows.targets(extent[0]), columns.targets(extent[1])
    if top.start == top.stop or left.start == left.stop:  # inside the padding
        return empty
    cells = logits[rows.sources(top), None, columns.sources(left)]
    upsampled = resized(cells, rows, top, columns, left)[:, 0]
    # the background becomes -inf, whose probability is 0; that of the foreground is at least 1/2
    foreground = torch.threshold_(upsampled, 0.0, -torch.inf).sigmoid_()
    crop = foreground.bool()  # takes a fifth of the time of a comparison
    confidence = float(foreground.sum() / (crop.sum(dtype=torch.int32) + 1e-6))
    return crop, top.start, left.start, confidence


def _bands(rows: int, elements_per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows with so many elements that a band is fast, but at least one row."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    return blocks(slice(0, rows), max(1, elements // max(elements_per_row, 1)))
