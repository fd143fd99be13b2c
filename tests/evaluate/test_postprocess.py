"""Inference against a plain reference: every mask upsampled in the official order, then the papers' rules."""

import pytest
import torch
from torch.nn import functional as F

from mpformer.evaluate import postprocess
from mpformer.evaluate.postprocess import Sizes, View

SIZES = [
    Sizes((64, 96), (64, 96), (64, 96)),  # nothing to crop or resize
    Sizes((64, 96), (50, 90), (75, 135)),  # enlarged
    Sizes((96, 64), (93, 62), (31, 20)),  # shrunk: not every source pixel is used
    Sizes((64, 64), (33, 64), (17, 33)),
]


def upsampled(logits: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The official order, in float64: up to the padded size, padding off, to the original size."""
    full = F.interpolate(logits[None].double(), sizes.padded, mode="bilinear", align_corners=False)
    cut = full[..., : sizes.valid[0], : sizes.valid[1]]
    return F.interpolate(cut, sizes.original, mode="bilinear", align_corners=False)[0]


def smooth_logits(queries: int, sizes: Sizes, seed: int) -> torch.Tensor:
    """Blobs rather than noise, so that no upsampled value is within rounding of the threshold."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, queries, 4, 4, generator=g) * 6
    size = (sizes.padded[0] // 4, sizes.padded[1] // 4)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0]


def logits(queries: int, classes: int, seed: int, sharpness: float = 3.0) -> torch.Tensor:
    return torch.randn(queries, classes + 1, generator=torch.Generator().manual_seed(seed)) * sharpness


@pytest.mark.parametrize("sizes", SIZES)
def test_matrices_are_the_two_resizings(sizes):
    masks = smooth_logits(5, sizes, 0)
    rows, columns = (r.matrix for r in sizes.resizings(masks))
    torch.testing.assert_close(
        (rows @ masks @ columns.T).double(), upsampled(masks, sizes), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("top_k", [7, 100])
def test_instances_equal_the_reference(sizes, top_k):
    classes, masks = logits(6, 3, 1), smooth_logits(6, sizes, 2)
    masks[3] = -1.0  # an empty mask is no instance
    found = list(postprocess.instance(View(classes, masks, sizes), top_k=top_k))

    probability = classes.double().softmax(-1)[:, :-1]
    full = upsampled(masks, sizes)
    expected = []
    for flat in probability.flatten().argsort(descending=True)[:top_k].tolist():
        q, k = divmod(flat, 3)
        foreground = full[q] > 0
        if foreground.any():
            score = probability[q, k] * full[q].sigmoid()[foreground].mean()
            expected.append((q, k, float(score), foreground))
    assert [(i.query, i.label) for i in found] == [e[:2] for e in expected]
    for one, (_, _, score, mask) in zip(found, expected):
        assert one.score == pytest.approx(score, abs=1e-4)
        assert (one.mask(sizes.original) != mask).sum() <= 1  # a pixel may lie within rounding of 0


def test_instances_of_things_only_and_above_the_threshold():
    sizes = SIZES[0]
    classes, masks = logits(8, 4, 3), smooth_logits(8, sizes, 4)
    everything = list(postprocess.instance(View(classes, masks, sizes), top_k=10))
    things = list(postprocess.instance(View(classes, masks, sizes), top_k=10, thing_labels=frozenset({0, 2})))
    assert [(i.query, i.label) for i in things] == [
        (i.query, i.label) for i in everything if i.label in (0, 2)
    ]
    middle = sorted(i.score for i in everything)[5]
    above = list(postprocess.instance(View(classes, masks, sizes), top_k=10, score_threshold=middle))
    assert {(i.query, i.label) for i in above} == {
        (i.query, i.label) for i in everything if i.score >= middle
    }
    assert len(above) == 5


def test_a_mask_in_the_padding_is_no_instance():
    sizes = Sizes((64, 64), (32, 64), (32, 64))
    masks = torch.full((1, 16, 16), -5.0)
    masks[0, 12:] = 5.0
    assert list(postprocess.instance(View(torch.tensor([[9.0, 0.0]]), masks, sizes))) == []


def reference_panoptic(classes, masks, sizes, confidence, overlap, things):
    """The rules of MaskFormer section 3.4 on full maps."""
    scores, labels = classes.double().softmax(-1).max(-1)
    kept = [q for q in range(len(classes)) if labels[q] < classes.shape[-1] - 1 and scores[q] > confidence]
    ids = torch.zeros(sizes.original, dtype=torch.int64)
    segments, stuff = [], {}
    if not kept:
        return ids, segments
    probability = upsampled(masks, sizes)[kept].sigmoid()
    winner = (scores[kept][:, None, None] * probability).argmax(0)
    for n, q in enumerate(kept):
        own = probability[n] >= 0.5
        won = winner == n
        label = int(labels[q])
        if not (won & own).any() or won.sum() / own.sum() < overlap:
            continue
        if label not in things and label in stuff:
            ids[won & own] = stuff[label]
            continue
        segments.append(label)
        stuff[label] = len(segments)
        ids[won & own] = len(segments)
    return ids, segments


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("confidence", "overlap"), [(0.0, 0.0), (0.5, 0.3), (0.5, 0.8), (1.0, 0.8)])
def test_panoptic_equals_the_reference(sizes, confidence, overlap, monkeypatch):
    monkeypatch.setattr(postprocess, "_CPU_ELEMENTS", 4000)  # several bands, the last one shorter
    classes, masks = logits(12, 3, 5), smooth_logits(12, sizes, 6)
    things = frozenset({0, 1})
    result = postprocess.panoptic(
        [View(classes, masks, sizes)], class_confidence=confidence, overlap=overlap, thing_labels=things
    )
    ids, labels = reference_panoptic(classes, masks, sizes, confidence, overlap, things)
    assert list(result.labels) == labels
    assert len(result.scores) == len(labels)
    assert (result.ids != ids).float().mean() < 1e-3
    if confidence == 0.0:
        assert len(labels) > 3
        assert labels.count(2) == 1  # stuff is merged
    if confidence == 1.0:
        assert not labels
        assert not result.ids.any()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("at_original", [False, True])
def test_semantic_equals_the_reference(sizes, at_original, monkeypatch):
    monkeypatch.setattr(postprocess, "_CPU_ELEMENTS", 5000)
    classes, masks = logits(9, 4, 7), smooth_logits(9, sizes, 8)
    probability = classes.double().softmax(-1)[:, :-1]
    if at_original:
        maps = torch.einsum("qk,qyx->kyx", probability, upsampled(masks, sizes).sigmoid())
    else:
        at_input = upsampled(masks, Sizes(sizes.padded, sizes.valid, sizes.valid)).sigmoid()
        maps = torch.einsum("qk,qyx->kyx", probability, at_input)
        maps = F.interpolate(maps[None], sizes.original, mode="bilinear", align_corners=False)[0]
    labels = postprocess.semantic([View(classes, masks, sizes)], at_original=at_original)
    assert len(labels.unique()) > 1
    assert (labels != maps.argmax(0)).float().mean() < 1e-3


def test_semantic_of_a_per_pixel_model():
    sizes = SIZES[1]
    maps = smooth_logits(4, sizes, 9)
    labels = postprocess.semantic([View(None, maps, sizes)])
    assert (labels != upsampled(maps, sizes).argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("sizes", SIZES)
def test_general_inference_equals_the_reference(sizes, monkeypatch):
    monkeypatch.setattr(postprocess, "_CPU_ELEMENTS", 5000)
    classes, masks = logits(9, 4, 10), smooth_logits(9, sizes, 11)
    probability, labels = classes.double().softmax(-1).max(-1)
    kept = [q for q in range(9) if labels[q] < 4 and probability[q] > 0.6]
    assert 1 < len(kept) < 9
    strength = upsampled(masks, sizes)[kept].sigmoid() * probability[kept][:, None, None]
    expected = labels[kept][strength.argmax(0)]
    found = postprocess.general([View(classes, masks, sizes)], class_confidence=0.6)
    assert (found != expected).float().mean() < 1e-3
    assert (postprocess.general([View(classes, masks, sizes)], class_confidence=1.0) == -1).all()


def test_a_flipped_view_is_flipped_back():
    """A view of the mirror image says of each pixel what the plain view says of it."""
    sizes = Sizes(
        (64, 96), (64, 96), (75, 135)
    )  # without padding, which a flipped view has on the other side
    classes, masks = logits(6, 3, 12), smooth_logits(6, sizes, 13)
    plain, flipped = View(classes, masks, sizes), View(classes, masks.flip(2), sizes, flipped=True)
    for infer in (
        lambda views: postprocess.semantic(views),
        lambda views: postprocess.semantic(views, at_original=True),
        lambda views: postprocess.general(views),
        lambda views: postprocess.panoptic(views, class_confidence=0.4, overlap=0.2, thing_labels={0}).ids,
    ):
        assert len(infer([plain]).unique()) > 1
        assert (infer([flipped]) != infer([plain])).float().mean() < 1e-3
        assert (infer([plain, flipped]) != infer([plain])).float().mean() < 1e-3


@pytest.mark.parametrize("at_original", [False, True])
def test_views_are_averaged_at_the_original_size(at_original):
    """Two scales, one of them flipped, against every map upsampled by itself in float64."""
    views, total = [], 0.0
    for i, sizes in enumerate((Sizes((64, 96), (50, 90), (75, 135)), Sizes((96, 160), (90, 160), (75, 135)))):
        classes, masks = logits(9, 4, 14 + i), smooth_logits(9, sizes, 16 + i)
        views.append(View(classes, masks, sizes, flipped=i == 1))
        probability = classes.double().softmax(-1)[:, :-1]
        if at_original:
            maps = torch.einsum("qk,qyx->kyx", probability, upsampled(masks, sizes).sigmoid())
        else:
            at_input = upsampled(masks, Sizes(sizes.padded, sizes.valid, sizes.valid)).sigmoid()
            maps = torch.einsum("qk,qyx->kyx", probability, at_input)[None]
            maps = F.interpolate(maps, sizes.original, mode="bilinear", align_corners=False)[0]
        total = total + (maps.flip(2) if i else maps)
    found = postprocess.semantic(views, at_original=at_original)
    assert (found != total.argmax(0)).float().mean() < 1e-3
    assert (found != postprocess.semantic(views[:1], at_original=at_original)).float().mean() > 0.01
