"""Post-processing in blocks and bands gives bit by bit what its plain form gives.

A matrix product may add its terms in any order, so equality of bits can only be asked for where every sum is
exact in float32: logits that are multiples of 1/8, sizes that are powers of 2 apart, so that weights are
multiples of 1/64. With other numbers, what is within rounding of a decision may differ.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpformer.evaluate import postprocess
from mpformer.evaluate.postprocess import Sizes, View
from mpformer.evaluate.postprocess_detr import detr_panoptic
from tests.evaluate import plain

THINGS = frozenset({0, 1, 3})
EXACT_SIZES = {
    "as the input": Sizes((160, 96), (160, 96), (160, 96)),
    "padded": Sizes((160, 96), (131, 70), (131, 70)),
    "enlarged": Sizes((96, 160), (84, 150), (168, 300)),
    "halved": Sizes((160, 288), (142, 280), (71, 140)),
    "stretched": Sizes((64, 160), (64, 160), (256, 40)),
    "smallest": Sizes((32, 32), (1, 1), (1, 1)),
}
OTHER_SIZES = {
    "COCO's": Sizes((192, 256), (180, 240), (108, 143)),
    "enlarged": Sizes((64, 96), (50, 90), (75, 135)),
}


def cells(sizes: Sizes) -> tuple[int, int]:
    return sizes.padded[0] // 4, sizes.padded[1] // 4


def random_logits(queries: int, sizes: Sizes, g: torch.Generator) -> Tensor:
    return torch.randint(-40, 41, (queries, *cells(sizes)), generator=g) / 8


def objects(queries: int, sizes: Sizes, g: torch.Generator) -> Tensor:
    """Rectangles anywhere, of which some are empty; the logits at their borders are exactly 0."""
    masks = torch.full((queries, *cells(sizes)), -1.0)
    for mask in masks:
        y, x, h, w = (int(v) for v in torch.randint(0, 20, (4,), generator=g))
        mask[y : y + h, x : x + w] = 1.0
    return masks


def tied(queries: int, sizes: Sizes, g: torch.Generator) -> Tensor:
    """Every map twice."""
    return random_logits(-(-queries // 2), sizes, g).repeat(2, 1, 1)[:queries]


LOGITS: dict[str, Callable[[int, Sizes, torch.Generator], Tensor]] = {
    "random": random_logits,
    "objects": objects,
    "tied": tied,
    "bfloat16": lambda *a: random_logits(*a).bfloat16(),
    "huge": lambda *a: random_logits(*a) * 2.0**100,
    "tiny": lambda *a: random_logits(*a) * 2.0**-100,
    "zero": lambda *a: random_logits(*a) * 0,
    "negative": lambda *a: -objects(*a).abs(),
    "positive": lambda *a: objects(*a).abs(),
}


def view_of(sizes: Sizes, logits: str = "random", queries: int = 12, classes: int = 4, seed: int = 0) -> View:
    """Class logits without ties but for those of every fourth query, which are no object."""
    g = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, classes + 1, generator=g) * 4
    class_logits[3::4, -1] = 20.0
    return View(class_logits, LOGITS[logits](queries, sizes, g), sizes)


@pytest.fixture(autouse=True)
def several_bands(monkeypatch):
    """The maps here would fit into one."""
    monkeypatch.setattr(postprocess, "_CPU_ELEMENTS", 20_000)


every_exact_size = pytest.mark.parametrize("sizes", EXACT_SIZES.values(), ids=EXACT_SIZES)
every_kind = pytest.mark.parametrize("logits", LOGITS)


def assert_same_instances(view: View, **settings) -> int:
    found = list(postprocess.instance(view, **settings))
    expected = plain.instance(view, **settings)
    assert [(i.query, i.label, i.score) for i in found] == [e[:3] for e in expected]
    for one, (*_, mask) in zip(found, expected):
        assert torch.equal(one.mask(view.sizes.original), mask)
    return len(found)


@every_exact_size
@every_kind
def test_instances(sizes, logits):
    count = assert_same_instances(view_of(sizes, logits))
    if logits in ("zero", "negative"):
        assert count == 0
    elif sizes.valid != (1, 1):
        assert count > 10


def test_instances_of_one_query_of_many_and_none_above_the_threshold():
    sizes = EXACT_SIZES["halved"]
    assert assert_same_instances(view_of(sizes, queries=1, classes=2)) == 2
    assert assert_same_instances(view_of(sizes, "objects", queries=300, classes=80)) > 80
    assert assert_same_instances(view_of(sizes), score_threshold=1.0) == 0
    assert 0 < assert_same_instances(view_of(sizes), score_threshold=0.2, thing_labels=THINGS) < 48


@pytest.mark.parametrize(("confidence", "overlap"), [(0.0, 0.0), (0.5, 0.1), (0.5, 0.8), (1.0, 0.8)])
@every_exact_size
@every_kind
def test_panoptic(sizes, logits, confidence, overlap):
    view, settings = view_of(sizes, logits), (confidence, overlap, THINGS)
    found = postprocess.panoptic([view], class_confidence=confidence, overlap=overlap, thing_labels=THINGS)
    ids, labels, scores = plain.panoptic([view], *settings)
    assert torch.equal(found.ids, ids)
    assert (found.labels, found.scores) == (labels, scores)
    if (confidence, overlap, logits) == (0.0, 0.0, "random") and sizes.valid != (1, 1):
        assert len(labels) > 5
    if confidence == 1.0:
        assert not labels


@pytest.mark.parametrize("queries", [1, 300])
def test_panoptic_of_one_query_and_of_many(queries):
    view = view_of(EXACT_SIZES["enlarged"], queries=queries)
    found = postprocess.panoptic([view], class_confidence=0.3, overlap=0.0, thing_labels=THINGS)
    ids, labels, scores = plain.panoptic([view], 0.3, 0.0, THINGS)
    assert torch.equal(found.ids, ids)
    assert (found.labels, found.scores) == (labels, scores)


@every_exact_size
@every_kind
def test_general(sizes, logits):
    for confidence in (0.3, 1.0):
        found = postprocess.general([view_of(sizes, logits)], class_confidence=confidence)
        assert torch.equal(found, plain.general([view_of(sizes, logits)], confidence))


@every_exact_size
@pytest.mark.parametrize("at_original", [False, True])
@pytest.mark.parametrize("queries", [1, 12, 300])
def test_semantic(sizes, at_original, queries):
    """Exact sums: mask probabilities 0, 1/2 and 1; each query has 1, 2, 4 or 8 equally likely classes."""
    g = torch.Generator().manual_seed(1)
    class_logits = torch.full((queries, 9), -200.0)  # probability 0
    for row in class_logits:
        row[torch.randperm(9, generator=g)[: 2 ** int(torch.randint(0, 4, (1,), generator=g))]] = 0.0
    view = View(class_logits, LOGITS["huge"](queries, sizes, g), sizes)
    found = postprocess.semantic([view], at_original=at_original)
    assert torch.equal(found, plain.class_maps([view], at_original).argmax(0))


@every_exact_size
def test_semantic_of_a_per_pixel_model(sizes):
    view = View(None, random_logits(7, sizes, torch.Generator().manual_seed(2)), sizes)
    assert torch.equal(postprocess.semantic([view]), plain.class_maps([view], False).argmax(0))


def test_several_views_one_of_them_flipped():
    first, second = EXACT_SIZES["enlarged"], Sizes((192, 320), (168, 300), (168, 300))
    views = [view_of(first), view_of(second, seed=1)]
    views[1] = View(views[1].class_logits, views[1].mask_logits, second, flipped=True)
    found = postprocess.panoptic(views, class_confidence=0.1, overlap=0.0, thing_labels=THINGS)
    ids, labels, scores = plain.panoptic(views, 0.1, 0.0, THINGS)
    assert torch.equal(found.ids, ids)
    assert (found.labels, found.scores) == (labels, scores)
    assert torch.equal(postprocess.general(views, class_confidence=0.1), plain.general(views, 0.1))
    for at_original in (False, True):
        assert_same_labels(views, at_original)


@every_exact_size
@every_kind
def test_detr_gives_every_pixel_the_first_of_the_largest_logits(sizes, logits):
    view = view_of(sizes, logits)
    scores, labels = view.class_probabilities().max(-1)
    kept = (labels < 4) & (scores > 0.3)
    owner = plain.upsampled(view)[kept].argmax(0)
    found = detr_panoptic([view], class_confidence=0.3, thing_labels=set(range(4)))
    if (torch.bincount(owner.flatten(), minlength=int(kept.sum())) >= 5).all():
        present, ids = owner.unique(return_inverse=True)
        assert torch.equal(found.ids, ids + 1)
        assert found.labels == tuple(labels[kept][present].tolist())


def assert_same_labels(views: list[View], at_original: bool) -> None:
    """But where the two best class scores are within rounding."""
    maps = plain.class_maps(views, at_original)
    best, second = maps.topk(2, 0).values
    differs = postprocess.semantic(views, at_original=at_original) != maps.argmax(0)
    assert (best - second)[differs].le(1e-5).all()
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize("sizes", [*EXACT_SIZES.values(), *OTHER_SIZES.values()])
@pytest.mark.parametrize("queries", [1, 100])
def test_any_numbers_agree_up_to_rounding(sizes, queries):
    g = torch.Generator().manual_seed(3)
    masks = torch.randn(queries, *cells(sizes), generator=g) * 5
    view = View(torch.randn(queries, 11, generator=g) * 4, masks, sizes)
    maps, expected = plain.upsampled(view), plain.instance(view, top_k=20)
    found = list(postprocess.instance(view, top_k=20))
    assert [(i.query, i.label) for i in found] == [e[:2] for e in expected]
    for one, (query, _, score, mask) in zip(found, expected):
        assert maps[query][one.mask(sizes.original) != mask].abs().le(1e-5).all()
        assert one.score == pytest.approx(score, rel=2e-6)
    for at_original in (False, True):
        assert_same_labels([view], at_original)


def test_logits_that_need_gradients_are_no_obstacle():
    view = view_of(EXACT_SIZES["halved"])
    learned = View(view.class_logits.requires_grad_(), view.mask_logits.requires_grad_(), view.sizes)
    assert len(list(postprocess.instance(learned))) > 10
    for labels in (postprocess.semantic([learned]), postprocess.general([learned])):
        assert not labels.requires_grad
