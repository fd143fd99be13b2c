"""The layers' diagnostics on hand-computed cases, and on a model against a plain recomputation."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from mpformer.data.images import load_image
from mpformer.evaluate.diagnostics import diagnose, draw_layers
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.layers import (
    attention_inside,
    layer_iou,
    mean_over_images,
    query_utilization,
    summarize,
)
from mpformer.evaluate.truth import target_of, true_segments
from mpformer.evaluate.views import prepare
from mpformer.model.matcher import Match
from mpformer.model.segmenter import structure_of
from mpformer.types import Head, Output
from tests.evaluate.scenes import ColourModel, scenes, tiny_config, tiny_model


def rows(*texts: str) -> torch.Tensor:
    """Masks [Q,1,w] as logits: '#' is foreground."""
    return torch.tensor([[[1.0 if c == "#" else -1.0 for c in text]] for text in texts])


def pairs(**queries: int) -> Match:
    """pairs(q3=0): query 3 is matched to object 0."""
    return Match(torch.tensor([int(q[1:]) for q in queries]), torch.tensor(list(queries.values())))


def test_layer_iou_by_hand():
    """IoU 2/4 and (both empty) 1, then 4/4 and 0/2."""
    heads = [rows("##..##", "......"), rows("#....#", "......"), rows("#....#", "..##..")]
    heads[0][0, 0, 1] = heads[0][0, 0, 4] = 1.0
    assert layer_iou(heads) == pytest.approx([(2 / 4 + 1) / 2, (1 + 0) / 2])


def test_a_logit_of_zero_is_foreground():
    assert layer_iou([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]) == [1.0]


def test_utilization_by_hand():
    """Three objects; layer 1 has one of the last layer's pairs, layer 2 has two."""
    last = pairs(q4=0, q7=1, q2=2)
    first = pairs(q4=0, q2=1, q7=2)
    second = pairs(q4=0, q7=1, q9=2)
    assert query_utilization([first, second, last]) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_utilization_without_objects_is_undefined():
    nothing = Match(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    assert query_utilization([nothing, nothing]) == []


def test_attention_inside_by_hand():
    """2x2 cells of 4 pixels; the object covers cell 0 and half of cell 1; query 1 has its attention there."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :6] = True
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.4, 0.1, 0.0]])
    assert attention_inside(weights, mask, pairs(q1=0), [4]) == pytest.approx(0.5 + 0.4 / 2)
    assert attention_inside(weights, mask[:0], Match(torch.tensor([]), torch.tensor([])), [4]) is None


def test_images_without_a_metric_are_left_out_of_its_mean():
    found = mean_over_images([{"u": {1: 0.5, 2: 1.0}}, {}, {"u": {1: 0.0, 2: 1.0}, "i": {1: 0.1}}])
    assert found == {"u": {1: pytest.approx(25), 2: pytest.approx(100)}, "i": {1: pytest.approx(10)}}


@pytest.fixture(scope="module")
def diagnosed():
    config, catalog = tiny_config(), scenes(4, seed=3)
    model = tiny_model(config).eval()
    return config, catalog, model, diagnose(model, catalog, config)


def test_every_layer_has_its_metrics(diagnosed):
    found = diagnosed[3].layers
    names = {"layer_iou", "query_utilization", "attention_inside"}
    names |= {"pilot_layer_iou", "pilot_query_utilization", "pilot_query_utilization_hard"}
    for name in names:
        assert list(found[name]) == [1, 2, 3], name
        assert all(0 <= v <= 100 for v in found[name].values())
    assert list(found["AR100"]) == [0, 1, 2, 3]
    assert found["query_utilization"][3] == found["pilot_query_utilization"][3] == 100
    assert set(found["pilot_query_utilization_hard"].values()) == {100.0}
    text = diagnosed[3].table()
    assert text.splitlines()[0].split() == ["layer", "0", "1", "2", "3"]
    assert "mIoU-L" in text


def test_metrics_of_a_model_equal_a_plain_recomputation(diagnosed):
    """Full masks without padding, matched by scipy on costs computed pair by pair in float64."""
    config, catalog, model, found = diagnosed
    ious, used = [], []
    for record in catalog.records:
        image = load_image(record)
        tensor, sizes = prepare(image, config.data.test_resize)
        target = target_of(record, sizes, "panoptic")
        with torch.no_grad():
            heads = model(tensor, all_heads=True).heads
        h, w = (len(range(2, edge, 4)) for edge in sizes.valid)  # centres in the image
        masks = [head.mask_logits[0, :, :h, :w] >= 0 for head in heads]
        for before, after in itertools.pairwise(masks):
            either, both = (before | after).sum((1, 2)), (before & after).sum((1, 2))
            ious.append(
                sum(1.0 if e == 0 else b / e for b, e in zip(both.tolist(), either.tolist())) / len(either)
            )
        # the target at the centres of the cells: bilinear between the four pixels around each
        wanted = target.masks.double()
        wanted = (
            wanted[:, 1::4, 1::4] + wanted[:, 2::4, 1::4] + wanted[:, 1::4, 2::4] + wanted[:, 2::4, 2::4]
        ) / 4
        matched = []
        for head in heads:
            cost = torch.zeros(len(head.mask_logits[0]), len(wanted), dtype=torch.float64)
            classes = head.class_logits[0].double().softmax(-1)
            centre_y, centre_x = torch.arange(wanted.shape[1]) * 4 + 2, torch.arange(wanted.shape[2]) * 4 + 2
            inside = (centre_y < sizes.valid[0])[:, None] & (centre_x < sizes.valid[1])
            for q in range(len(cost)):
                logits = head.mask_logits[0, q].double()[inside]
                for n in range(len(wanted)):
                    t = wanted[n][inside]
                    p = logits.sigmoid()
                    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
                    entropy = F.binary_cross_entropy_with_logits(logits, t)
                    cost[q, n] = 5 * entropy + 5 * dice - 2 * classes[q, target.labels[n]]
            matched.append(set(zip(*(x.tolist() for x in linear_sum_assignment(cost.numpy())))))
        used += [len(m & matched[-1]) / len(matched[-1]) for m in matched[1:]]
    images = len(catalog.records)
    for layer in (1, 2, 3):
        mean_iou = sum(ious[layer - 1 :: 3]) / images * 100
        assert found.layers["layer_iou"][layer] == pytest.approx(mean_iou, rel=1e-4)
        mean_used = sum(used[layer - 1 :: 3]) / images * 100
        assert found.layers["query_utilization"][layer] == pytest.approx(mean_used, rel=1e-6)


def test_recorded_attention_is_that_of_the_layer(diagnosed):
    """Probing the layer key by key gives the same weights."""
    model = diagnosed[2]
    attention = model.decoder.layers[0].cross_attn
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 5, 32, generator=g), torch.randn(1, 7, 32, generator=g)
    allowed = torch.rand(1, 5, 7, generator=g) < 0.6
    allowed[..., 0] = True
    weights = attention.weights(query, key, allowed)
    assert weights.sum(-1) == pytest.approx(torch.ones(1, 5), abs=1e-6)
    assert (weights[~allowed] == 0).all()
    with torch.no_grad():  # a value that only key k has arrives in the output as much as k is attended to
        attention = copy.deepcopy(attention)
        attention.in_proj_weight[64:] = torch.eye(32)
        attention.in_proj_bias[64:] = 0
        attention.out_proj = torch.nn.Identity()
        for k in range(7):
            values = torch.zeros(1, 7, 32)
            values[0, k] = 1.0
            paid = attention(query, key, values, allowed).unflatten(2, (4, 8))[..., 0].mean(2)
            torch.testing.assert_close(paid, weights[..., k])


def test_objects_beyond_the_queries_and_images_without_objects(diagnosed):
    config, catalog, model, _ = diagnosed
    bare = replace(catalog, records=[replace(catalog.records[0], segments=())])
    found = diagnose(model, bare, config).layers
    assert set(found) == {"layer_iou"}
    record = scenes(8, seed=3).records[5]
    many = replace(record, segments=record.segments * 5)
    assert len(many.segments) > config.model.decoder.queries
    crowded = diagnose(model, replace(catalog, records=[many]), config, quality=False).layers
    assert crowded["query_utilization"][3] == 100


def test_an_evaluation_measures_the_layers_in_the_same_forward(diagnosed):
    """The same metrics as `diagnose`, for any order of the images."""
    config, catalog, model, found = diagnosed
    predictions = [p for i in (2, 0, 3, 1) for p in predict_records(model, catalog, config, [i])]
    figures = summarize(predictions)
    assert figures == summarize(sorted(predictions, key=lambda p: p.image_id))
    for name in ("layer_iou", "query_utilization"):
        for layer in (1, 2, 3):
            assert figures[f"{name}_{layer}"] == pytest.approx(found.layers[name][layer])
    options = config.evaluate.model_copy(update={"layers": False})
    without = list(predict_records(model, catalog, config.model_copy(update={"evaluate": options}), [0]))
    assert without[0].layers is None
    assert without[0].instances == predictions[1].instances
    assert summarize(without) == {}


class Wavering(ColourModel):
    """Four heads that agree, except that the first two do not predict the grass."""

    config = tiny_config().model
    structure = structure_of(config, 4)

    def forward(self, images, pilots=None, all_heads=False):
        head = super().forward(images).heads[0]
        blind = head.mask_logits.clone()
        blind[:, 3] = -9.0
        return Output((Head(head.class_logits, blind),) * 2 + (head,) * 2)


def test_the_least_consistent_query_is_drawn_over_the_layers():
    """Heads 0 to 3 and the ground truth; the query is the grass's, empty in heads 0 and 1."""
    config, record = tiny_config(), scenes(1, seed=3).records[0]
    sheet = draw_layers(Wavering(), record, config, "cpu", columns=5).astype(int)
    factor = -(-480 // min(record.height, record.width))
    height, width = record.height * factor, record.width * factor
    assert sheet.shape[1] == 5 * width + 4 * 8
    tiles = [sheet[-height:, i * (width + 8) :][:, :width] for i in range(5)]
    marked = [((tile.max(2) - tile.min(2)) > 20).mean() for tile in tiles]  # only the mask has colour
    grass = (true_segments(record).semantic() == 3).mean()
    assert marked == pytest.approx([0, 0, grass, grass, grass], abs=0.06)
    assert draw_layers(Wavering(), replace(record, segments=()), config, "cpu") is None
