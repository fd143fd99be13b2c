"""Post-processing in its plain form: whole maps by dense products, one map after the other, then the rules.

What `mpformer.evaluate.postprocess` has to give bit by bit. Views have sizes and logits as there.
"""

from collections.abc import Sequence, Set

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.evaluate.postprocess import View


def matrix(source: int, padded: int, valid: int, original: int) -> Tensor:
    """[original,source]: the identity resized to the padded size, cropped, resized to the original."""
    return bilinear(valid, original) @ bilinear(source, padded)[:valid]


def bilinear(source: int, target: int) -> Tensor:
    identity = torch.eye(source)[None, None]
    return F.interpolate(identity, (target, source), mode="bilinear", align_corners=False)[0, 0]


def matrices(view: View) -> tuple[Tensor, Tensor]:
    sizes = view.sizes
    axes = zip(view.mask_logits.shape[1:], sizes.padded, sizes.valid, sizes.original)
    rows, columns = (matrix(*edges) for edges in axes)
    return rows, columns.flip(0) if view.flipped else columns


def upsampled(view: View) -> Tensor:
    """[Q,h,w] logits."""
    rows, columns = matrices(view)
    return rows @ view.mask_logits.float() @ columns.T


def instance(
    view: View, top_k: int = 100, score_threshold: float = 0.0, thing_labels: Set[int] | None = None
) -> list[tuple[int, int, float, Tensor]]:
    """(query, label, score, mask [h,w]) of each."""
    rows, columns = matrices(view)
    maps, classes = upsampled(view), view.class_logits.shape[1] - 1
    best = view.class_logits.float().softmax(-1)[:, :-1].flatten().topk(min(top_k, classes * len(maps)))
    found = []
    for flat, score in zip(best.indices.tolist(), best.values.tolist()):
        query, label = divmod(flat, classes)
        cells = view.mask_logits[query] > 0
        # the mean is taken over the part that can be positive, which decides the order of the sum
        touched = [
            ((weights != 0) & cells.any(axis)).any(1).nonzero()[:, 0]
            for weights, axis in ((rows, 1), (columns, 0))
        ]
        if not all(map(len, touched)) or (thing_labels is not None and label not in thing_labels):
            continue
        box = tuple(slice(int(t[0]), int(t[-1]) + 1) for t in touched)
        part = maps[query][box].contiguous()
        confidence = float((part.sigmoid() * (part > 0)).sum() / ((part > 0).sum() + 1e-6))
        if confidence > 0 and score * confidence >= score_threshold:
            found.append((query, label, score * confidence, maps[query] > 0))
    return found


def confident(views: Sequence[View], class_confidence: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n], labels [n] and mask probabilities [n,h,w] of the queries above `class_confidence`."""
    probabilities = torch.stack([v.class_logits.float().softmax(-1) for v in views]).mean(0)
    scores, labels = probabilities.max(-1)
    kept = (labels < probabilities.shape[-1] - 1) & (scores > class_confidence)
    masks = torch.stack([upsampled(view)[kept].sigmoid() for view in views]).sum(0) / len(views)
    return scores[kept], labels[kept], masks


def panoptic(
    views: Sequence[View], class_confidence: float, overlap: float, thing_labels: Set[int]
) -> tuple[Tensor, tuple[int, ...], tuple[float, ...]]:
    """Ids [h,w], labels and scores."""
    scores, labels, masks = confident(views, class_confidence)
    ids = torch.zeros(views[0].sizes.original, dtype=torch.int64)
    if not len(scores):
        return ids, (), ()
    best = (masks * scores[:, None, None]).argmax(0)
    found: list[tuple[int, float]] = []
    stuff: dict[int, int] = {}
    for n, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
        own, won = masks[n] >= 0.5, best == n
        if not (own & won).any() or won.sum() < overlap * own.sum():
            continue
        if label in stuff:
            found[stuff[label] - 1] = label, max(score, found[stuff[label] - 1][1])
        else:
            found.append((label, score))
        segment = stuff.get(label, len(found))
        if label not in thing_labels:
            stuff[label] = segment
        ids[own & won] = segment
    return ids, tuple(label for label, _ in found), tuple(score for _, score in found)


def general(views: Sequence[View], class_confidence: float) -> Tensor:
    scores, labels, masks = confident(views, class_confidence)
    if not len(scores):
        return torch.full(views[0].sizes.original, -1)
    return labels[(masks * scores[:, None, None]).argmax(0)]


def class_maps(views: Sequence[View], at_original: bool) -> Tensor:
    """[K,h,w] class scores, of which the largest is the label."""
    return sum((_class_maps(view, at_original) for view in views[1:]), _class_maps(views[0], at_original))


def _class_maps(view: View, at_original: bool) -> Tensor:
    if view.class_logits is None:
        return upsampled(view)
    probabilities = view.class_logits.float().softmax(-1)[:, :-1]
    if at_original:
        return torch.einsum("qk,qyx->kyx", probabilities, upsampled(view).sigmoid())
    (padded, valid, original), cells = vars(view.sizes).values(), view.mask_logits.shape[1:]
    up = [matrix(cells[a], padded[a], valid[a], valid[a]) for a in (0, 1)]
    maps = torch.einsum("qk,qyx->kyx", probabilities, (up[0] @ view.mask_logits.float() @ up[1].T).sigmoid())
    down = [bilinear(valid[a], original[a]) for a in (0, 1)]
    return down[0] @ maps @ (down[1].flip(0) if view.flipped else down[1]).T
