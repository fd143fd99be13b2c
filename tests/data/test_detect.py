"""A folder that no settings describe: what is missing or broken is said, and nothing is put in its place."""

import json
import shutil

import cv2
import numpy as np
import pytest

from mpformer.data.detect import detect
from mpformer.types import InputError
from tests.data.folders import annotation, coco_folder, photograph


def content(count=3, **changes):
    numbers = range(1, count + 1)
    listed = [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in numbers]
    annotations = [annotation(n, n) for n in numbers]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    return {"images": listed, "annotations": annotations, "categories": categories, **changes}


def write(root, name, what):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))


def images(root, folder, numbers=range(1, 4), ending="png"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for n in numbers:
        cv2.imwrite(str(root / folder / f"{n}.{ending}"), photograph(seed=n)[..., ::-1])


def usual(root):
    """COCO's layout; both splits use the same file names."""
    for split in ("train", "val"):
        write(root, f"annotations/instances_{split}2017.json", content())
        images(root, f"{split}2017")
    return root


def test_test_is_never_the_validation_split(tmp_path):
    for split in ("train", "test", "valid"):
        write(tmp_path, f"{split}/_annotations.coco.json", content())
        images(tmp_path, split)
    found = detect(tmp_path)
    assert (found.dataset.train.images, found.dataset.val.images) == ("train", "valid")
    assert found.dataset.val.annotations == "valid/_annotations.coco.json"
    assert any("test/_annotations.coco.json is not used: a test split" in note for note in found.notes)
    shutil.rmtree(tmp_path / "valid")
    found = detect(tmp_path)
    assert found.dataset.val.annotations == "train/_annotations.coco.json"
    assert (found.dataset.train.share, found.dataset.val.share) == ((0.0, 0.8), (0.8, 1.0))
    assert any("there is no validation split: 20% of the images" in note for note in found.notes)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(
        InputError, match=r"no COCO annotations .*test/_annotations\.coco\.json: a test split"
    ):
        detect(tmp_path)


BROKEN = {
    "cut": (json.dumps(content())[:-40], "not valid JSON"),
    "empty file": ("", "not valid JSON"),
    "not UTF-8": ("\x00\xff", "not valid JSON"),
    "nothing annotated": (content(annotations=[]), "'annotations' is empty"),
    "no images": (content(images=[]), "'images' is empty"),
    "no annotations": ({"images": [{}], "categories": []}, "no list 'annotations'"),
    "deep": ("[" * 200000, "not valid JSON"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_json_is_named_and_no_other_takes_its_place(tmp_path, case, split):
    broken, reason = BROKEN[case]
    root = usual(tmp_path)
    write(root, f"annotations/instances_{split}2017.json", broken)
    other = "val" if split == "train" else "train"
    with pytest.raises(InputError, match=f"instances_{split}2017.json: {reason}") as error:
        detect(root)
    assert f"annotations of '{split}'" in str(error.value)
    assert f"instances_{other}2017.json: annotations" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_split_is_said(tmp_path):
    root = usual(tmp_path)
    (root / "annotations/instances_train2017.json").unlink()
    with pytest.raises(InputError, match=r"no training annotations.*instances_val2017\.json: annotations"):
        detect(root)
    usual(root)
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(InputError, match="val2017 seems to be the validation split, but no JSON has its"):
        detect(root)


def test_images_of_another_split_or_of_the_masks_are_never_taken(tmp_path):
    root = usual(tmp_path)
    shutil.rmtree(root / "val2017")
    with pytest.raises(
        InputError, match=r"instances_val2017\.json: its images, '1\.png'.*val\.images=FOLDER"
    ):
        detect(root)
    images(root, "pictures")
    assert detect(root).dataset.val.images == "pictures"
    images(root, "backup")
    with pytest.raises(
        InputError, match=r"are in backup and in pictures; name one: data\.dataset\.val\.images"
    ):
        detect(root)


def test_other_files_of_a_split_are_passed_over_with_the_reason(tmp_path):
    root = usual(tmp_path)
    captions = content(annotations=[{"id": 1, "image_id": 1, "caption": "a cat"}])
    write(root, "annotations/captions_train2017.json", captions)
    write(root, "annotations/person_keypoints_train2017.json", content())
    write(root, "annotations/image_info_test2017.json", {"images": [{}], "categories": []})
    write(root, "package.json", {"name": "x"})
    write(root, "__MACOSX/annotations/._instances_train2017.json", "\x00")
    found = detect(root)
    assert found.dataset.train.annotations == "annotations/instances_train2017.json"
    told = "; ".join(found.notes)
    assert "captions_train2017.json is not used: its annotations have neither" in told
    assert "person_keypoints_train2017.json is not used: another of its split comes first" in told
    assert "image_info_test2017.json is not used: no list 'annotations'" in told
    assert "package.json is not used: no COCO annotations" in told
    assert "MACOSX" not in told


def test_images_and_id_maps_of_the_same_names(tmp_path):
    """Whichever folder comes first in the alphabet, before or after the other."""
    for place, masks in (("a", "annotations/panoptic_{}"), ("b", "zz_masks_{}"), ("c", "aa_masks/{}")):
        root = tmp_path / place
        for split in ("train", "val"):
            segments = [{"id": 5, "category_id": 3}]
            maps = [{"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in (1, 2)]
            whole = content(2, annotations=maps, categories=[{"id": 3, "name": "cat", "isthing": 1}])
            write(root, f"annotations/panoptic_{split}.json", whole)
            images(root, f"pictures/{split}", (1, 2))
            folder = root / masks.format(split)
            folder.mkdir(parents=True)
            for n in (1, 2):
                cv2.imwrite(str(folder / f"{n}.png"), np.full((40, 60, 3), (0, 0, 5), np.uint8))
        found = detect(root).dataset
        assert found.format == "coco_panoptic"
        assert (found.train.images, found.train.panoptic_masks) == ("pictures/train", masks.format("train"))
        assert (found.val.images, found.val.panoptic_masks) == ("pictures/val", masks.format("val"))


def test_the_first_image_may_be_missing(tmp_path):
    root = usual(tmp_path)
    (root / "train2017/1.png").unlink()
    assert detect(root).dataset.train.images == "train2017"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("instances_train2017.json", "train"),
        ("a/trainval.json", "train"),
        ("interval_valves/result.json", None),
        ("VOCdevkit/annotations.json", None),
        ("train/val_labels.json", "val"),
        ("valid/_annotations.coco.json", "val"),
        ("instances_minival2014.json", "val"),
        ("testset/x.json", "test"),
        ("image_info_test-dev2017.json", "test"),
        ("latest.json", None),
    ],
)
def test_the_split_in_a_path(path, split):
    from mpformer.data.detect import split_of

    assert split_of(path) == split


def test_one_json_for_both_splits_needs_two_images(tmp_path):
    coco_folder(tmp_path, images=5)
    (tmp_path / "train.json").rename(tmp_path / "result.json")
    found = detect(tmp_path).dataset
    assert found.train.annotations == found.val.annotations == "result.json"
