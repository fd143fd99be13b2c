"""Pilots, matching and losses written image by image and head by head, to compare the batched forms with."""

import itertools

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from mpformer.model.boxes import generalized_iou, relative_boxes
from mpformer.model.matcher import FOCAL_ALPHA, FOCAL_GAMMA
from mpformer.model.noise import build_noise, label_noise, released_label_noise
from mpformer.model.piloting import pilot_layout
from mpformer.model.points import cell_centers, sample


class Plain:
    """The step's functions for one batch; random numbers come row by row from `draws`."""

    def __init__(self, batch, config, structure, draws):
        self.batch, self.config, self.loss, self.structure, self.draws = (
            batch,
            config,
            config.loss,
            structure,
            draws,
        )

    def numbers(self, purpose, image, row, place):
        return self.draws.rows(purpose, np.array([image]), np.array([row]), np.array([place]))

    # ---- pilots

    def pilots(self):
        """Of each image: labels [n], objects [n], groups [n], attention masks {index of the layer: [n,S]}."""
        pilot = self.config.pilot
        layout = pilot_layout([len(t.labels) for t in self.batch.targets], pilot)
        return [
            self.pilots_of(b, layout.groups[b], layout.per_group[b]) for b in range(len(self.batch))
        ], layout

    def pilots_of(self, b, groups, per_group):
        pilot, target = self.config.pilot, self.batch.targets[b]
        rules, count = pilot.rules(), len(target.labels)
        order = list(range(count))
        if count > per_group:
            scores = [float(self.numbers("pilot objects", b, n, 0).uniform()) for n in order]
            order = sorted(order, key=scores.__getitem__)
        objects = torch.tensor(order[:per_group] * groups, dtype=torch.long)
        labels = target.labels[objects].clone()
        flip = label_noise if rules.label_flip == "other_class" else released_label_noise
        for slot in range(len(objects)):
            draws = self.numbers("pilot labels", b, slot, 0)
            one = labels[slot : slot + 1]
            labels[slot] = flip(
                one, self.structure.classes, pilot.label_noise, draws.uniform(), draws.uniform()
            )
        slots = torch.arange(len(objects))
        return labels, objects, slots // max(1, per_group), self.attention_masks(b, objects)

    def attention_masks(self, b, objects):
        pilot, strides = self.config.pilot, self.structure.attention_strides
        noise, rules, target = build_noise(pilot), pilot.rules(), self.batch.targets[b]
        any_pixel = rules.level_masks == "any_pixel" or not pilot.moves_objects
        result = {}
        for number in pilot.layer_numbers(len(strides)):
            finest = min(
                8 if noise.at_once else 32,
                *(s for n in pilot.layer_numbers(len(strides)) for s in strides[n - 1]),
            )
            rows = []
            for slot, n in enumerate(objects.tolist()):
                mask = target.masks[n : n + 1]
                mask = coarser(mask, finest, any_pixel)
                draws = self.numbers("pilot noise", b, slot, 0)
                for apply in noise.at_once:
                    mask = apply(mask, relative_boxes(target.masks[n : n + 1]), draws)
                parts = []
                for i, stride in enumerate(strides[number - 1]):
                    part = coarser(mask, stride // finest, any_pixel)
                    draws = self.numbers("pilot noise", b, slot, 3 * number + i)
                    for apply in noise.at_each_layer:
                        part = apply(part, draws)
                    parts.append(part.flatten(1))
                cells = torch.cat(parts, 1)
                rows.append(~cells if rules.complement and pilot.moves_objects and number > 1 else cells)
            cells = sum(
                (target.masks.shape[1] // s) * (target.masks.shape[2] // s) for s in strides[number - 1]
            )
            result[number - 1] = torch.cat(rows) if rows else torch.zeros(0, cells, dtype=torch.bool)
        return result

    # ---- matching

    def matching_points(self, b, head, purpose, size):
        count = self.loss.for_matching().points
        if count is None:
            return cell_centers(size, torch.device("cpu"))
        return self.numbers(purpose, b, 0, head).points(count)[0]

    def cost(self, head, number, b, purpose="matching"):
        """[Q,N] of one image."""
        loss, target = self.loss, self.batch.targets[b]
        class_cost = -head.class_logits[b].softmax(-1)[:, target.labels]
        if loss.match_by == "boxes":
            predicted, wanted = (
                head.boxes[b][:, None],
                relative_boxes(target.masks)[None].to(head.boxes.dtype),
            )
            distance = (predicted - wanted).abs().sum(2)
            giou = generalized_iou(predicted, wanted)
            return loss.class_weight * class_cost + loss.box_weight * distance - loss.giou_weight * giou
        maps = head.mask_logits[b]
        points = self.matching_points(b, number, purpose, maps.shape[1:])
        logits = sample(maps, points.expand(len(maps), -1, -1))
        wanted = sample(target.masks.to(maps.dtype), points.expand(len(target.masks), -1, -1))
        counted = self.counted(points, b, maps.dtype)
        rows = []
        for x in logits:
            row = []
            for t in wanted:
                row.append(
                    loss.mask_weight * mask_loss(x, t, counted, loss) + loss.dice_weight * dice(x, t, counted)
                )
            rows.append(torch.stack(row) if row else x.new_zeros(0))
        return loss.class_weight * class_cost + torch.stack(rows)

    def check_matches(self, heads, found):
        """The pairs of each head and image (queries, objects) are as many as can be, and the cheapest ones.

        There may be several: no point may lie in some small objects of a class.
        """
        for number, of_head in enumerate(found):
            source = (heads[-1], 0) if self.loss.matching == "last_head" else (heads[number], number)
            for b, (queries, objects) in enumerate(of_head):
                cost = self.cost(*source, b)
                assert (
                    len(queries)
                    == len(set(queries.tolist()))
                    == len(set(objects.tolist()))
                    == min(cost.shape)
                )
                best = cost[linear_sum_assignment(cost.numpy())].sum()
                torch.testing.assert_close(cost[queries, objects].sum(), best, rtol=1e-9, atol=1e-9)

    def check_pilots(self, heads, pilots, found):
        """Every pilot has its own object, or each group its objects at the least cost."""
        for number, of_head in enumerate(found):
            for b, ((slots, chosen), (_, own, groups, _)) in enumerate(zip(of_head, pilots)):
                assert torch.equal(slots, torch.arange(len(own)))
                if self.config.pilot.assignment != "match" or not len(own):
                    assert torch.equal(chosen, own)
                    continue
                cost = self.cost(heads[number], number, b, "pilot matching")
                for group in groups.unique():
                    rows = (groups == group).nonzero()[:, 0]
                    assert sorted(chosen[rows].tolist()) == sorted(own[rows].tolist())
                    best = cost[rows][:, own[rows]]
                    best = best[linear_sum_assignment(best.numpy())].sum()
                    torch.testing.assert_close(cost[rows, chosen[rows]].sum(), best, rtol=1e-9, atol=1e-9)

    # ---- losses

    def counted(self, points, b, dtype):
        if self.loss.padding == "counted":
            return torch.ones(len(points), dtype=dtype)
        (height, width), size = self.batch.valid_sizes[b], self.batch.images.shape[2:]
        return ((points[:, 0] < width / size[1]) & (points[:, 1] < height / size[0])).to(dtype)

    def points(self, logits, draws):
        """[P,2] of one mask."""
        counts = self.loss.point_counts()
        candidates = draws.points(counts.candidates)
        distance = sample(logits[None].detach(), candidates)[0].abs()
        kept = candidates[0, distance.argsort(stable=True)[: counts.important]]
        return torch.cat((kept, draws.points(counts.uniform)[0]))

    def pair(self, logits, mask, b, draws, chosen_by=None):
        """Mask and dice loss of a predicted and a true mask; points where `chosen_by` is least certain."""
        if self.loss.points is None:
            size = mask.shape
            logits = F.interpolate(
                logits[None, None], size=size, mode="bilinear", align_corners=False
            ).flatten()
            wanted, points = mask.flatten().to(logits.dtype), cell_centers(size, torch.device("cpu"))
        else:
            points = self.points(logits if chosen_by is None else chosen_by, draws)
            logits = sample(logits[None], points[None])[0]
            wanted = sample(mask[None].to(logits.dtype), points[None])[0]
        counted = self.counted(points, b, logits.dtype)
        return mask_loss(logits, wanted, counted, self.loss), dice(logits, wanted, counted)

    def class_loss(self, logits, wanted):
        weight = torch.tensor(
            [1.0] * self.structure.classes + [self.loss.no_object_weight], dtype=logits.dtype
        )
        return F.cross_entropy(logits, wanted, weight, reduction="sum")

    def boxes(self, head, b, query, n):
        predicted = head.boxes[b, query]
        wanted = relative_boxes(self.batch.targets[b].masks)[n].to(predicted.dtype)
        return (predicted - wanted).abs().sum(), 1 - generalized_iou(predicted, wanted)

    def part(self, heads, chosen, trained, purpose, rows, normalizers, shared=False):
        """Losses by name and head; chosen: queries and objects by head and image; trained: queries."""
        loss, (objects, classes) = self.loss, normalizers
        result = {
            name: []
            for name in ("class", "mask", "dice", *(("box", "giou") if heads[0].boxes is not None else ()))
        }
        for number, head in enumerate(heads):
            total = {name: head.mask_logits.new_zeros(()) for name in result}
            for b, (queries, own) in enumerate(chosen[number]):
                target = self.batch.targets[b]
                wanted = torch.full((head.class_logits.shape[1],), self.structure.classes)
                wanted[queries] = target.labels[own]
                total["class"] = total["class"] + self.class_loss(
                    head.class_logits[b, : trained[b]], wanted[: trained[b]]
                )
                for query, n in zip(queries.tolist(), own.tolist()):
                    draws = self.numbers(purpose, b, n if shared or rows == "object" else query, number)
                    mean = head.mask_logits[b, queries[own == n]].sum(0).detach() if shared else None
                    both = self.pair(head.mask_logits[b, query], target.masks[n], b, draws, mean)
                    total["mask"], total["dice"] = total["mask"] + both[0], total["dice"] + both[1]
                    if "box" in total:
                        distance, giou = self.boxes(head, b, query, n)
                        total["box"], total["giou"] = total["box"] + distance, total["giou"] + giou
            weights = {"class": (loss.class_weight, classes), "mask": (loss.mask_weight, objects)}
            weights |= {
                "dice": (loss.dice_weight, objects),
                "box": (loss.box_weight, objects),
                "giou": (loss.giou_weight, objects),
            }
            for name, value in total.items():
                weight, count = weights[name]
                result[name].append(weight * value / count)
        return {name: torch.stack(values) for name, values in result.items()}

    def consistency(self, heads, normalizer):
        losses = []
        for number, (before, head) in enumerate(itertools.pairwise(heads)):
            total = 0
            for b in range(len(self.batch)):
                for q in range(head.mask_logits.shape[1]):
                    label = before.mask_logits[b, q].detach() >= 0
                    both = self.pair(
                        head.mask_logits[b, q], label, b, self.numbers("consistency", b, q, number)
                    )
                    total = total + self.loss.mask_weight * both[0] + self.loss.dice_weight * both[1]
            losses.append(self.loss.consistency_weight * total / normalizer)
        return torch.stack(losses)


def coarser(masks, step, any_pixel):
    if not any_pixel:
        return masks[:, ::step, ::step]
    return F.max_pool2d(masks.float()[:, None], step)[:, 0] > 0


def mask_loss(logits, wanted, counted, loss):
    """Of one mask; logits [P]."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if loss.mask_loss == "focal":
        balance = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
        entropy = balance * (1 - (-entropy).exp()) ** FOCAL_GAMMA * entropy
    return (entropy * counted).sum() / counted.sum().clamp(min=1)


def dice(logits, wanted, counted):
    p, t = logits.sigmoid() * counted, wanted * counted
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
