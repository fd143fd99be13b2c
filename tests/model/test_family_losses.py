"""Focal loss, boxes, fixed assignment, per-pixel losses: against `transformers`, or by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from mpformer.config.model import Loss, Model
from mpformer.model.boxes import generalized_iou, relative_boxes
from mpformer.model.losses import Normalizers, count_for_normalizers, matching_losses
from mpformer.model.matcher import Match, match, matching_points
from mpformer.model.objects import in_a_row
from mpformer.model.per_pixel import per_pixel_losses
from mpformer.model.segmenter import structure_of
from mpformer.types import Head, Target
from tests.model.hugging_face import transformers
from tests.model.samples import batch_of, blobs, draws_of, pairs_of

NORMALIZERS = Normalizers(5.0, 7.0, 11.0, 13.0, 17.0, 19.0)
SIZE = (64, 96)


def random_head(queries=6, classes=3, boxes=False) -> Head:
    random = torch.Generator().manual_seed(0)
    return Head(
        torch.randn(1, queries, classes + 1, generator=random).double(),
        torch.randn(1, queries, 16, 24, generator=random).double(),
        torch.rand(1, queries, 4, generator=random).double() if boxes else None,
    )


def losses_of(head: Head, target: Target, config: Loss, *queries: int) -> dict[str, torch.Tensor]:
    """Of one image, whose objects these queries predict in order."""
    objects = in_a_row([target])
    pairs = pairs_of([Match(torch.tensor(queries), torch.arange(len(queries)))], objects)
    return matching_losses([head], objects, pairs, NORMALIZERS, config)


def matched(head: Head, target: Target, config: Loss) -> Match:
    return match(head, in_a_row([target]), config, draws_of(1), ["a"])[0]


def test_focal_and_dice_are_maskformers():
    reference = transformers.models.maskformer.modeling_maskformer
    head, target = random_head(), blobs(3, SIZE)
    config = Loss(mask_loss="focal", points=None, mask_weight=20.0, dice_weight=1.0)
    got = losses_of(head, target, config, 4, 0, 2)
    raised = F.interpolate(head.mask_logits, SIZE, mode="bilinear", align_corners=False)[0, [4, 0, 2]]
    flat, wanted = raised.flatten(1), target.masks.flatten(1).double()
    focal, dice = reference.sigmoid_focal_loss(flat, wanted, 5), reference.dice_loss(flat, wanted, 5)
    assert float(got["mask"]) == pytest.approx(20 * float(focal), rel=1e-6)
    assert float(got["dice"]) == pytest.approx(float(dice), rel=1e-6)


def test_the_focal_cost_is_maskformers():
    reference = transformers.models.maskformer.modeling_maskformer
    head = random_head(queries=4)
    masks = torch.zeros(4, *SIZE, dtype=torch.bool)
    for i, mask in enumerate(masks):  # edges on cells of stride 4, where a cell has one value
        mask[8 * i : 8 * i + 16, 16 * i : 16 * i + 24] = True
    target = Target(torch.tensor([0, 1, 2, 1]), masks)
    config = Loss(class_weight=1.0, mask_loss="focal", mask_weight=20.0, dice_weight=1.0, points=None)
    coarse = masks[:, ::4, ::4].flatten(1).double()
    logits = head.mask_logits[0].flatten(1)
    cost = (
        -head.class_logits[0].softmax(-1)[:, target.labels]
        + 20 * reference.pair_wise_sigmoid_focal_loss(logits, coarse)
        + reference.pair_wise_dice_loss(logits, coarse)
    )
    found = matched(head, target, config)
    best = min(
        (sum(float(cost[q, o]) for o, q in enumerate(order)), order)
        for order in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
        if len(set(order)) == 4
    )[1]
    assert dict(zip(found.objects.tolist(), found.queries.tolist())) == dict(enumerate(best))


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def looped_giou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners(a), corners(b)
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def test_generalized_iou_by_hand():
    boxes = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).double()
    got = generalized_iou(boxes[:, None], boxes[None])
    for i, a in enumerate(boxes.tolist()):
        for j, b in enumerate(boxes.tolist()):
            assert float(got[i, j]) == pytest.approx(looped_giou(a, b))
    nothing = torch.zeros(4)
    assert float(generalized_iou(nothing, nothing)) == 0


def test_boxes_of_masks():
    masks = torch.zeros(2, 40, 80, dtype=torch.bool)
    masks[0, 10:30, 20:60] = True
    assert relative_boxes(masks).tolist() == [[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]


def test_box_losses_and_costs_by_hand():
    head, target = random_head(boxes=True), blobs(2, SIZE)
    config = Loss(match_by="boxes", points=16)
    truth = relative_boxes(target.masks).tolist()
    boxes = head.boxes[0].tolist()
    got = losses_of(head, target, config, 3, 1)
    distance = sum(abs(a - b) for q, t in zip((3, 1), truth) for a, b in zip(boxes[q], t))
    giou = sum(1 - looped_giou(boxes[q], t) for q, t in zip((3, 1), truth))
    assert float(got["box"]) == pytest.approx(5 * distance / 5)
    assert float(got["giou"]) == pytest.approx(2 * giou / 5)
    costs = {}
    for first in range(6):
        for second in range(6):
            if first != second:
                costs[first, second] = sum(
                    -2 * float(head.class_logits[0, q].softmax(-1)[target.labels[o]])
                    + 5 * sum(abs(a - b) for a, b in zip(boxes[q], truth[o]))
                    - 2 * looped_giou(boxes[q], truth[o])
                    for o, q in enumerate((first, second))
                )
    found = matched(head, target, config)
    chosen = dict(zip(found.objects.tolist(), found.queries.tolist()))
    assert (chosen[0], chosen[1]) == min(costs, key=costs.get)


def test_a_fixed_assignment_gives_class_k_to_query_k():
    target = Target(torch.tensor([2, 0]), blobs(2, SIZE).masks)
    found = matched(random_head(queries=3), target, Loss(assignment="fixed"))
    assert found.queries.tolist() == [2, 0]
    assert found.objects.tolist() == [0, 1]
    config = Model(loss=Loss(assignment="fixed"))
    assert config.queries(3) == 3
    assert float(
        count_for_normalizers(batch_of([target]), config, structure_of(config, 3))[1]
    ) == pytest.approx(2 + 0.1)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"points": 20}, 20),
        ({"points": 20, "match_points": 12}, 12),
        ({"points": 20, "match_points": None}, None),
        ({"points": None, "match_points": 12}, 12),
        ({"points": None}, None),
        ({"points": 20, "match_by": "boxes"}, None),
        ({"points": 20, "assignment": "fixed"}, None),
    ],
)
def test_points_of_matching_and_of_the_loss_are_apart(settings, count):
    points = matching_points(Loss(**settings), draws_of(2), 2, 3, "matching")
    assert (points is None) == (count is None)
    assert points is None or points.shape == (3, 2, count, 2)


def regions() -> Target:
    """Classes 2 and 0; the rest of the image is void."""
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, :4, :6] = True
    masks[1, 4:, 3:] = True
    return Target(torch.tensor([2, 0]), masks)


def test_per_pixel_cross_entropy_by_hand():
    target = regions()
    logits = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    raised = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)[0]
    total = 0.0
    for y in range(8):
        for x in range(12):
            for label, mask in zip(target.labels.tolist(), target.masks):
                if mask[y, x]:
                    scores = [math.exp(float(raised[k, y, x])) for k in range(3)]
                    total -= math.log(scores[label] / sum(scores))
    got = per_pixel_losses([Head(None, logits)], in_a_row([target]), 19.0, 17.0, Loss())
    assert set(got) == {"pixel"}
    assert float(got["pixel"]) == pytest.approx(total / 19)
    config = Model.model_validate({"output": "per_pixel", "pilot": {"queries": 0}, "decoder": {"layers": 0}})
    assert (
        float(count_for_normalizers(batch_of([target]), config, structure_of(config, 3))[5]) == 4 * 6 + 4 * 9
    )


def test_per_pixel_focal_and_dice_by_hand():
    target = regions()
    logits = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    raised = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=False)[0]
    labelled = target.masks.any(0)
    focal = dice = 0.0
    for k in range(3):
        region = target.masks[target.labels == k].any(0)
        values, products, sums = [], 0.0, 0.0
        for y in range(8):
            for x in range(12):
                if labelled[y, x]:
                    p = 1 / (1 + math.exp(-float(raised[k, y, x])))
                    on = bool(region[y, x])
                    right = p if on else 1 - p
                    values.append((0.25 if on else 0.75) * (1 - right) ** 2 * -math.log(right))
                    products += p * on
                    sums += p + on
        focal += sum(values) / len(values)
        dice += 1 - (2 * products + 1) / (sums + 1)
    config = Loss(per_pixel="focal_dice", mask_loss="focal", mask_weight=20.0, dice_weight=1.0)
    got = per_pixel_losses([Head(None, logits)], in_a_row([target]), 19.0, 17.0, config)
    assert float(got["mask"]) == pytest.approx(20 * focal / 17)
    assert float(got["dice"]) == pytest.approx(dice / 17)


def test_per_pixel_losses_of_several_images_and_heads():
    """Images with other classes and without any: the sums of each, head by head."""
    random = torch.Generator().manual_seed(4)
    targets = [regions(), blobs(0, (8, 12)), Target(torch.tensor([1]), regions().masks[:1])]
    heads = [Head(None, torch.randn(3, 3, 2, 3, generator=random).double()) for _ in range(2)]
    for config in (Loss(), Loss(per_pixel="focal_dice", mask_loss="focal")):
        together = per_pixel_losses(heads, in_a_row(targets), 19.0, 17.0, config)
        for number, head in enumerate(heads):
            each = [
                per_pixel_losses([Head(None, maps[None])], in_a_row([target]), 19.0, 17.0, config)
                for maps, target in zip(head.mask_logits, targets)
            ]
            for name, values in together.items():
                expected = sum(float(one[name][0]) for one in each)
                assert float(values[number]) == pytest.approx(expected, rel=1e-9)


def test_where_objects_overlap_the_last_one_labels_the_pixel():
    masks = torch.ones(2, 8, 12, dtype=torch.bool)
    logits = torch.zeros(1, 3, 2, 3).double()
    logits[:, 1] = 5.0
    (first,), (second,) = (
        per_pixel_losses(
            [Head(None, logits)], in_a_row([Target(torch.tensor(labels), masks)]), 96.0, 1.0, Loss()
        )["pixel"]
        for labels in ([0, 1], [1, 0])
    )
    assert float(second - first) == pytest.approx(5.0)
