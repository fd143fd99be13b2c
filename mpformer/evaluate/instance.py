"""COCO's mask AP and boundary AP, computed by pycocotools in memory; run-length encoding of masks.

The only module of `evaluate` that imports pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from mpformer.evaluate.panoptic import Matches
from mpformer.evaluate.prediction import FoundInstance, Scores
from mpformer.types import ClassTable

BOUNDARY_WIDTH = 0.02
"""Width of a mask's boundary as a fraction of the image diagonal (Boundary IoU, section 4)."""
DETECTIONS = (1, 10, 100)
"""COCO's limits on the detections per image and class."""
AREAS = ("all", "small", "medium", "large")
"""COCO's area ranges: small below 32^2 pixels of the image, medium up to 96^2, large above."""


@dataclass(frozen=True)
class TrueInstance:
    """One annotated object, or a crowd region."""

    label: int
    crowd: bool
    counts: bytes
    """The mask as COCO's compressed run lengths."""
    area: float
    """Annotated area in pixels: decides between small, medium and large."""


def encode(crop: np.ndarray, top: int, left: int, size: tuple[int, int]) -> bytes:
    """COCO's compressed run lengths of a mask of `size` (h, w) that is False outside `crop` [h',w'] bool.

    Equal to pycocotools' encoding of the whole mask, but takes time in proportion to the crop.
    """
    height, width = size
    columns = np.zeros((crop.shape[1], crop.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = crop.T
    # one start and one end for each run, column by column
    ends = np.flatnonzero(columns[:, 1:] != columns[:, :-1])
    ends += ends // (crop.shape[0] + 1) * (height - crop.shape[0] - 1) + left * height + top
    apart = np.ones(len(ends), dtype=bool)  # but where a run continues in the next column
    apart[1:-1:2] = apart[2::2] = ends[1:-1:2] != ends[2::2]
    counts = np.diff(ends[apart], prepend=0, append=height * width)
    runs = counts if counts[-1] else counts[:-1]
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]


def encode_mask(mask: np.ndarray) -> bytes:
    """COCO's compressed run lengths of a whole mask [h,w] bool."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def decode(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """The mask [h,w] bool that `encode` encoded."""
    return coco_mask.decode({"size": list(size), "counts": counts}).astype(bool)


def area(counts: bytes, size: tuple[int, int]) -> int:
    """Number of pixels of the mask."""
    return int(coco_mask.area({"size": list(size), "counts": counts}))


def bounding_box(counts: bytes, size: tuple[int, int]) -> list[float]:
    """[x, y, width, height] in pixels (COCO's `bbox`)."""
    return [float(v) for v in coco_mask.toBbox({"size": list(size), "counts": counts})]


def boundary(counts: bytes, size: tuple[int, int]) -> bytes:
    """The pixels of a mask that are within 2 % of the image diagonal of its contour or the image border.

    Cheng et al., Boundary IoU (CVPR 2021): the mask minus its erosion by a square.
    """
    left, top, width, height = (int(v) for v in bounding_box(counts, size))
    if not width:
        return counts
    mask = decode(counts, size)[top : top + height, left : left + width].view(np.uint8)
    reach = max(1, round(BOUNDARY_WIDTH * float(np.hypot(*size))))
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    core = cv2.erode(np.ascontiguousarray(mask), square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return encode((mask - core).view(bool), top, left, size)


@dataclass(frozen=True)
class ImageInstances:
    """Ground truth and predicted instances of one image."""

    size: tuple[int, int]
    truth: Sequence[TrueInstance]
    found: Sequence[FoundInstance]


def match_instances(image: ImageInstances, *, min_score: float = 0.5) -> Matches:
    """Greedy matches of one image at IoU above 0.5, best score first, each to its best unmatched object.

    Used to rank and draw images. Instances below `min_score` are ignored, and so is one with more than half
    of its area in a crowd region of its class. Places are those in `image.truth` and `image.found`.
    """
    true = [j for j, one in enumerate(image.truth) if not one.crowd]
    crowd = [one for one in image.truth if one.crowd]
    kept = [i for i, one in enumerate(image.found) if one.score >= min_score]
    kept.sort(key=lambda i: -image.found[i].score)
    found = [image.found[i] for i in kept]
    truth = [image.truth[j] for j in true]
    ious = _ious(found, truth, image.size, crowd=False)
    in_crowd = _ious(found, crowd, image.size, crowd=True)
    free = set(range(len(truth)))
    matched: list[tuple[int, int]] = []
    others: list[int] = []
    for i, one in enumerate(found):
        best = max((j for j in free if truth[j].label == one.label), key=lambda j: ious[i, j], default=None)
        if best is not None and ious[i, best] > 0.5:
            free.remove(best)
            matched.append((best, i))
        elif not any(in_crowd[i, j] > 0.5 for j, c in enumerate(crowd) if c.label == one.label):
            others.append(i)
    missed, confused = set(free), []
    for i in others:
        best = max(free, key=lambda j: ious[i, j], default=None)
        if best is not None and ious[i, best] > 0.5:
            free.remove(best)
            confused.append((best, i))
    return Matches(
        _places(matched, true, kept),
        np.array([ious[i, j] for j, i in matched]),
        np.array([kept[i] for i in others], np.int64),
        np.array([true[j] for j in sorted(missed)], np.int64),
        _places(confused, true, kept),
    )


def _places(pairs: Sequence[tuple[int, int]], true: Sequence[int], found: Sequence[int]) -> np.ndarray:
    return np.array([(true[j], found[i]) for j, i in pairs], np.int64).reshape(-1, 2)


def _ious(
    found: Sequence[FoundInstance], truth: Sequence[TrueInstance], size: tuple[int, int], crowd: bool
) -> np.ndarray:
    """IoU [found,truth]; with `crowd` the fraction of each found mask inside each crowd region."""
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    masks = [[{"size": list(size), "counts": one.counts} for one in side] for side in (found, truth)]
    return coco_mask.iou(*masks, [int(crowd)] * len(truth))


class _Evaluation(COCOeval):
    """pycocotools' evaluation of one class, from memory, on the images where that class occurs.

    One class at a time, because pycocotools keeps a table for every image, class and area range.
    """

    def __init__(
        self, label: int, occurrences: Sequence[tuple[int, ImageInstances]], by_boundary: bool = False
    ) -> None:
        super().__init__(iouType="segm")
        self._by_boundary = by_boundary
        self.params.imgIds = [image_id for image_id, _ in occurrences]
        self.params.catIds = [label]
        self._occurrences = occurrences

    def _prepare(self) -> None:
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        self.evalImgs: dict[Any, list[Any]] = defaultdict(list)
        self.eval: dict[str, np.ndarray] = {}
        [label] = self.params.catIds
        number = 0  # ids start at 1: pycocotools reads 0 as "unmatched"
        for image_id, image in self._occurrences:
            for true in image.truth:
                if true.label == label:
                    number += 1
                    entry = _annotation(number, image_id, label, true.counts, image.size, true.area)
                    entry["iscrowd"] = entry["ignore"] = int(true.crowd)
                    self._gts[image_id, label].append(entry)
            for found in image.found:
                if found.label == label:
                    number += 1
                    pixels = area(found.counts, image.size)
                    entry = _annotation(number, image_id, label, found.counts, image.size, pixels)
                    entry["score"] = found.score
                    self._dts[image_id, label].append(entry)

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """IoU [detections,truth], best detection first; with `by_boundary` the minimum of both IoUs."""
        ious = super().computeIoU(imgId, catId)
        if not self._by_boundary or len(ious) == 0:
            return ious
        truth = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        boundaries = [[self._boundary(entry) for entry in entries] for entries in (found, truth)]
        return np.minimum(ious, coco_mask.iou(*boundaries, [t["iscrowd"] for t in truth]))

    @staticmethod
    def _boundary(entry: dict[str, Any]) -> dict[str, Any]:
        size, counts = entry["segmentation"]["size"], entry["segmentation"]["counts"]
        return {"size": size, "counts": boundary(counts, tuple(size))}


def _tables(evaluation: _Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Precision [IoU,recall level,area,detections] and recall [IoU,area,detections] of the class."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _annotation(
    number: int, image_id: int, label: int, counts: bytes, size: tuple[int, int], pixels: float
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label,
        "segmentation": {"size": list(size), "counts": counts},
        "area": pixels,
    }


def average_precision(
    images: Sequence[ImageInstances], classes: ClassTable, labels: Set[int], *, by_boundary: bool = False
) -> Scores:
    """COCO's mask AP and AR of the classes `labels`, in percent.

    AP, AP50, AP75, AP_small, AP_medium, AP_large: means over IoU 0.5..0.95 unless named and over the classes
    with truth, with at most 100 detections per image and class; AR1, AR10, AR100; AR_small, AR_medium,
    AR_large (at 100 detections). Per class: AP, AP50, AR100. Detections in crowd regions are ignored.
    `by_boundary` uses the minimum of mask IoU and boundary IoU.
    """
    occurrences: dict[int, list[tuple[int, ImageInstances]]] = {label: [] for label in sorted(labels)}
    for image_id, image in enumerate(images):
        present = {one.label for one in image.truth} | {one.label for one in image.found}
        for label in present & occurrences.keys():
            occurrences[label].append((image_id, image))
    tables = [_tables(_Evaluation(label, where, by_boundary)) for label, where in occurrences.items()]
    if not tables:
        return Scores()
    # [IoU,recall level,class,area,detections] and [IoU,class,area,detections]; -1: undefined
    precision = np.stack([p for p, _ in tables], axis=2)
    recall = np.stack([r for _, r in tables], axis=1)
    metrics = {
        "AP": precision[..., 0, -1],
        "AP50": precision[0, ..., 0, -1],
        "AP75": precision[5, ..., 0, -1],
    }
    metrics |= {f"AP_{name}": precision[..., a, -1] for a, name in enumerate(AREAS) if a}
    metrics |= {f"AR{most}": recall[..., 0, m] for m, most in enumerate(DETECTIONS)}
    metrics |= {f"AR_{name}": recall[..., a, -1] for a, name in enumerate(AREAS) if a}
    per_class = {
        classes.names[label]: _defined(
            {
                "AP": precision[:, :, k, 0, -1],
                "AP50": precision[0, :, k, 0, -1],
                "AR100": recall[:, k, 0, -1],
            }
        )
        for k, label in enumerate(sorted(labels))
    }
    return Scores(_defined(metrics), {name: row for name, row in per_class.items() if row})


def _defined(tables: dict[str, np.ndarray]) -> dict[str, float]:
    """Means in percent over the defined entries; a metric without any is left out."""
    defined = {name: values[values > -1] for name, values in tables.items()}
    return {name: float(values.mean() * 100) for name, values in defined.items() if values.size}
