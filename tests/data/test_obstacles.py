"""What has nothing to learn or to measure stops `data check` and the start of a run alike."""

import json

import cv2
import numpy as np
import pytest

from mpformer.cli.main import main
from mpformer.config import Data, DataSet, LabelMaps, LargeScaleJitter, Split
from mpformer.config.data import ClassEntry, LabelSplit
from mpformer.data.catalog import open_split
from mpformer.data.check import check, obstacle
from mpformer.data.obstacles import notes_of, require_usable
from mpformer.types import InputError
from tests.data.folders import annotation, coco_folder, photograph

RUNS = {"size": [40, 60], "counts": [100, 300, 2000]}


def outcomes(data):
    """What `data check` says is in the way, and what the start of a run raises."""
    found = obstacle(check(data), data.on_bad_sample)
    try:
        require_usable(data, {split: open_split(data, split) for split in ("train", "val")})
    except InputError as error:
        return found, str(error)
    return found, None


def stopped(data, *parts):
    found, raised = outcomes(data)
    for text in (found, raised):
        assert text is not None
        assert "\n" not in text
        for part in parts:
            assert part in text


def test_ordinary_data_are_not_stopped(tmp_path):
    assert outcomes(coco_folder(tmp_path)) == (None, None)


def test_no_object_at_all(tmp_path):
    stopped(coco_folder(tmp_path, []), "nothing to learn: small train: no object in 4 images")


def test_only_the_validation_split_is_empty(tmp_path):
    data = coco_folder(tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**content, "annotations": []}))
    split = Split(images="images", annotations="val.json")
    data = data.model_copy(update={"dataset": data.dataset.model_copy(update={"val": split})})
    stopped(data, "nothing to measure: small val: no object in 4 images")


def test_train_refuses_before_anything_is_started(tmp_path, capsys):
    coco_folder(tmp_path / "set", [])
    place = [f"data.dataset.{split}.{key}" for split in ("train", "val") for key in ("images", "annotations")]
    named = [f"{key}={'images' if key.endswith('images') else 'train.json'}" for key in place]
    settings = [f"data.root={tmp_path / 'set'}", f"storage={tmp_path / 'runs'}", *named]
    assert main(["train", "coco-tiny", *settings]) == 2
    assert "nothing to learn: coco train: no object in 4 images" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/checkpoints"))


@pytest.mark.parametrize("images", [4, 60])
def test_all_crowds(tmp_path, images):
    """60: more than a run looks at."""
    crowds = [annotation(n, n, segmentation=RUNS, iscrowd=1) for n in range(1, images + 1)]
    data = coco_folder(tmp_path, crowds, images)
    stopped(data, "nothing to learn", "are crowds, which are no targets", "data.dataset.ignore_iscrowd=true")
    as_objects = data.dataset.model_copy(update={"ignore_iscrowd": True})
    assert outcomes(data.model_copy(update={"dataset": as_objects})) == (None, None)
    one = [*crowds[1:], annotation(99, 1)]
    assert outcomes(coco_folder(tmp_path, one, images)) == (None, None)


def test_one_object_in_many_images_is_enough(tmp_path):
    assert outcomes(coco_folder(tmp_path, [annotation(1, 60)], 60)) == (None, None)


def test_fractions_of_the_size(tmp_path):
    parts = [[0.2, 0.2, 0.9, 0.2, 0.9, 0.8]]
    fractions = [annotation(n, n, segmentation=parts) for n in range(1, 5)]
    data = coco_folder(tmp_path, fractions)
    stopped(data, "coordinates in units of the image's size", "annotation 1 and all others", "multiply x by")
    mixed = [annotation(n, 1 + n % 4, segmentation=parts) for n in range(1, 4)]
    data = coco_folder(tmp_path, [*mixed, *(annotation(10 + n, 1 + n % 4) for n in range(4))])
    stopped(data, "objects outside their images", "3 of 7 objects have no pixel in their image")


def test_objects_that_no_training_image_shows(tmp_path):
    """3x3 pixels of a 60x40 image at its size: each less than a cell of 4x4; four times as large, learned."""
    square = [[10.0, 10.0, 13.0, 10.0, 13.0, 13.0, 10.0, 13.0]]
    data = coco_folder(tmp_path, [annotation(n, n, segmentation=square, area=9.0) for n in range(1, 5)])
    small = LargeScaleJitter(size=(64, 64), scale=(1.0, 1.0))
    stopped(data.model_copy(update={"augment": small}), "objects smaller than a cell", "4 of 4 objects")
    large = LargeScaleJitter(size=(256, 256), scale=(1.0, 1.0))
    assert outcomes(data.model_copy(update={"augment": large})) == (None, None)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_than_the_file_has_room_for(tmp_path, bits):
    data = coco_folder(tmp_path)
    for n in range(1, 5):
        grey = photograph(seed=n).astype(np.uint16).sum(2)
        scaled = grey * (2**bits - 1) // grey.max()
        cv2.imwrite(str(tmp_path / "images" / f"{n}.png"), scaled.astype(np.uint16))
    stopped(data, f"has a value above {2**bits - 1}", f"set data.bits={bits}")
    assert outcomes(data.model_copy(update={"bits": bits})) == (None, None)
    if bits > 8:
        stopped(data.model_copy(update={"bits": bits - 2}), "would be white", f"set data.bits={bits}")


def test_label_maps_in_the_place_of_images(tmp_path):
    data = coco_folder(tmp_path)
    for n in range(1, 5):
        cv2.imwrite(str(tmp_path / "images" / f"{n}.png"), (photograph(seed=n) > 99).astype(np.uint8))
    stopped(data, "images that are nearly black", "no value of 4 images exceeds 1 of 255", "label maps")


BLOB = [[5.0, 6.0, 25.0, 6.0, 25.0, 12.0, 15.0, 12.0, 15.0, 36.0, 5.0, 36.0]]
"""An L: its transpose lies elsewhere."""


def annotated(masks, **changes):
    """An annotation in each image for a mask that is given as a polygon or run lengths, and the true box."""
    return [
        annotation(n, n, segmentation=masks, bbox=[5, 6, 20, 30], area=360.0, **changes) for n in range(1, 5)
    ]


def moved(function):
    points = [function(x, y) for x, y in zip(BLOB[0][::2], BLOB[0][1::2])]
    return [[v for point in points for v in point]]


def test_masks_that_are_not_where_their_boxes_are(tmp_path):
    assert outcomes(coco_folder(tmp_path / "right", annotated(BLOB))) == (None, None)
    turned = annotated(moved(lambda x, y: (y, x)))
    stopped(coco_folder(tmp_path / "turned", turned), "masks that do not lie in their boxes", "exchanged")
    half = annotated(moved(lambda x, y: (x / 2, y / 2)))
    stopped(coco_folder(tmp_path / "half", half), "4 of 4 masks are not where", "times as large")
    # rows first, where COCO has columns first
    pixels = np.zeros((40, 60), np.uint8)
    cv2.fillPoly(pixels, [np.array(BLOB[0], int).reshape(-1, 2)], 1)
    edges = np.flatnonzero(np.diff(pixels.ravel(), prepend=0, append=0))
    counts = np.diff(np.concatenate([[0], edges, [2400]])).tolist()
    rows = annotated({"size": [40, 60], "counts": counts})
    found, raised = outcomes(coco_folder(tmp_path / "rows", rows))
    assert "masks that do not lie in their boxes" in found
    assert "masks that do not lie in their boxes" in raised
    # boxes as corners, which nothing reads: the masks are right
    corners = [{**a, "bbox": [5, 6, 25, 36]} for a in annotated(BLOB)]
    assert outcomes(coco_folder(tmp_path / "corners", corners)) == (None, None)


def test_masks_that_do_not_have_their_areas(tmp_path):
    inverted = {"size": [40, 60], "counts": [0, 100, 300, 2000]}
    data = coco_folder(tmp_path / "a", [annotation(n, n, segmentation=inverted) for n in range(1, 5)])
    stopped(data, "masks that contradict their areas", "7 times the area")
    of_boxes = [{**a, "area": 600.0} for a in annotated(BLOB)]
    assert outcomes(coco_folder(tmp_path / "b", of_boxes)) == (None, None)
    for area in (0, None, 0.004):  # not stated, or in another unit, beside a box that agrees
        unstated = [{**a, "area": area} for a in annotated(BLOB)]
        assert outcomes(coco_folder(tmp_path / f"c{area}", unstated))[1] is None


def test_images_without_content_and_dark_photographs(tmp_path):
    data = coco_folder(tmp_path)
    for n in range(1, 5):
        cv2.imwrite(str(tmp_path / "images" / f"{n}.png"), np.full((40, 60, 3), 40 * n, np.uint8))
    stopped(data, "images without content", "each of 4 images has one colour alone")
    for n in range(1, 5):
        noise = np.random.default_rng(n).integers(0, 10, (40, 60, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{n}.png"), noise)
    assert outcomes(data) == (None, None)
    assert "dark images" in {f.kind for f in check(data)["train"].findings}


def test_boxes_alone_are_called_that(tmp_path):
    boxes = [annotation(n, n, segmentation=[], bbox=[5, 6, 20, 30]) for n in range(1, 5)]
    found, raised = outcomes(coco_folder(tmp_path, boxes).model_copy(update={"on_bad_sample": "skip"}))
    assert "there is only a 'bbox', and a box is no mask" in found
    assert "there is only a 'bbox', and a box is no mask" in raised
    four = [annotation(n, n, segmentation=[5, 6, 20, 30]) for n in range(1, 5)]
    with pytest.raises(InputError, match=r"a box of four numbers.*\(and 3 more faults"):
        open_split(coco_folder(tmp_path, four), "train")


def test_validation_images_that_are_training_images_are_told(tmp_path):
    data = coco_folder(tmp_path)
    kinds = {f.kind for f in check(data)["val"].findings}
    assert "validation images that are training images" in kinds
    lines = notes_of({split: open_split(data, split) for split in ("train", "val")})
    assert lines == [
        "validation images that are training images: 4, the first: 4 of 4: figures on them say "
        "nothing of other images"
    ]


def panoptic(root, write):
    """Two images whose id PNG `write` makes from the ids [h,w] int32."""
    segments = [{"id": 1000, "category_id": 3}, {"id": 70000, "category_id": 7}]
    maps = [{"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in (1, 2)]
    data = coco_folder(root, maps, images=2)
    (root / "ids").mkdir()
    ids = np.full((40, 60), 1000, np.int32)
    ids[10:30, 10:40] = 70000
    for n in (1, 2):
        cv2.imwrite(str(root / "ids" / f"{n}.png"), write(ids))
    split = Split(images="images", annotations="train.json", panoptic_masks="ids")
    dataset = DataSet(name="small", format="coco_panoptic", train=split, val=split)
    return data.model_copy(update={"dataset": dataset, "task": "panoptic"})


def channels(ids, order):
    planes = {"R": ids & 255, "G": ids >> 8 & 255, "B": ids >> 16}
    return np.stack([planes[c] for c in order], 2).astype(np.uint8)


def test_id_maps_in_another_order_of_channels_or_depth(tmp_path):
    assert outcomes(panoptic(tmp_path / "a", lambda ids: channels(ids, "BGR"))) == (None, None)
    turned = panoptic(tmp_path / "b", lambda ids: channels(ids, "RGB"))  # cv2 writes the first as blue
    stopped(turned, "ids in another order of channels", "the maps of 2 images", "exchange R and B")
    deep = panoptic(tmp_path / "c", lambda ids: (ids % 65536).astype(np.uint16))
    found, raised = outcomes(deep)
    assert "no image that can be used" in found
    assert "the id map is grey, 16-bit" in raised
    other = panoptic(tmp_path / "d", lambda ids: channels(ids + 5, "BGR"))
    stopped(other, "nothing to learn", "none of 4 objects has a pixel in its image")


def label_maps(root, value, ignore, names=("background", "building")):
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for n in range(1, 4):
        pixels = np.zeros((40, 60), np.uint8)
        pixels[10:20, 10:40] = value
        cv2.imwrite(str(root / "images" / f"{n}.jpg"), photograph(seed=n))
        cv2.imwrite(str(root / "labels" / f"{n}.png"), pixels)
    split = LabelSplit(images="images", labels="labels")
    classes = tuple(ClassEntry(name=name, id=i) for i, name in enumerate(names))
    dataset = LabelMaps(name="maps", train=split, val=split, classes=classes, ignore=ignore)
    augment = LargeScaleJitter(size=(64, 96))
    return Data(root=str(root), task="semantic", dataset=dataset, augment=augment, loader="inline")


def test_a_class_that_is_lost_to_ignore(tmp_path):
    assert outcomes(label_maps(tmp_path / "a", 1, (255,))) == (None, None)
    lost = label_maps(tmp_path / "b", 255, (255,))
    stopped(lost, "only 'background' occurs, and the ignored value 255 covers 12.5 %", "'building' (now 1)")
    others = label_maps(tmp_path / "c", 7, "others")
    stopped(others, "the ignored value 7 covers")
    # a set of which one class occurs, and nothing is ignored, may be meant so
    assert outcomes(label_maps(tmp_path / "d", 0, (255,))) == (None, None)


def test_a_record_that_cannot_be_used_stops_a_run_at_its_start(tmp_path):
    data = coco_folder(tmp_path)
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    found, raised = outcomes(data)
    assert "cannot be used: 2" in found
    assert "3.png: not an image" in raised
    assert outcomes(data.model_copy(update={"on_bad_sample": "skip"})) == (None, None)


def test_panoptic_data_need_to_say_what_is_countable(tmp_path):
    data = panoptic(tmp_path, lambda ids: channels(ids, "BGR"))
    content = json.loads((tmp_path / "train.json").read_text())
    bare = [{"id": 3, "name": "cat"}, {"id": 7, "name": "sky"}]
    (tmp_path / "train.json").write_text(json.dumps({**content, "categories": bare}))
    with pytest.raises(InputError, match=r"category 3 \(cat\) has no 'isthing'.*data\.dataset\.stuff=\[NAME"):
        open_split(data, "train")

    def with_stuff(*names):
        return data.model_copy(update={"dataset": data.dataset.model_copy(update={"stuff": names})})

    assert open_split(with_stuff("sky"), "train").classes.thing_labels == {0}
    assert open_split(with_stuff(), "train").classes.thing_labels == {0, 1}
    with pytest.raises(InputError, match="no category 'skye'; nearest: sky"):
        open_split(with_stuff("skye"), "train")


def test_what_may_be_meant_is_a_note(tmp_path):
    boxes = [[5.0, 6.0, 25.0, 6.0, 25.0, 36.0, 5.0, 36.0]]
    data = coco_folder(tmp_path / "a", [{**a, "area": 600.0} for a in annotated(boxes)])
    assert outcomes(data) == (None, None)
    assert "masks that are boxes" in {f.kind for f in check(data)["train"].findings}
    for value, ignore, why in (
        (2, (), "do maps count from 1"),
        (255, (255,), "the ignored values 255 occur"),
    ):
        data = label_maps(tmp_path / str(value), value, ignore, ("ground", "car", "tree"))
        for n in range(1, 4):
            path = str(tmp_path / str(value) / "labels" / f"{n}.png")
            pixels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            pixels[pixels == 0] = 1
            pixels[:5] = 0 if value == 255 else 1
            cv2.imwrite(path, pixels)
        assert outcomes(data) == (None, None)
        [text] = [f.text for f in check(data)["train"].findings if f.kind == "classes without a pixel"]
        assert why in text
