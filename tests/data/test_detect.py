"""A folder that no settings describe: what is missing or broken is said, and nothing is put in its place."""

import json
import shutil

import cv2
import numpy as np
import pytest

from mpformer.cli.found import config_at
from mpformer.data.catalog import open_split
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
    taken = "annotations/instances_train2017.json (3 images) is taken"
    assert f"person_keypoints_train2017.json is not used: {taken}" in told
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


def chosen(root, **given):
    """The train and val JSONs, with what is given as train__images="a"."""
    nested = {}
    for key, value in given.items():
        *section, last = key.split("__")
        (nested.setdefault(section[0], {}) if section else nested)[last] = value
    found = detect(root, nested).dataset
    return found.train.annotations, found.val.annotations


@pytest.mark.parametrize(
    "other",
    [
        "annotations/instances_train2017 (1).json",
        "annotations/instances_minitrain2017.json",
        "annotations/debug_train.json",
        "annotations/instances_train2017_backup.json",
        "annotations/a/instances_train2017.json",
    ],
)
def test_the_usual_name_is_taken_and_the_other_is_told_with_its_images(tmp_path, other):
    root = usual(tmp_path)
    write(root, other, content(1))
    found = detect(root)
    assert found.dataset.train.annotations == "annotations/instances_train2017.json"
    [note] = found.notes
    assert note.startswith(f"{other} is not used: annotations/instances_train2017.json (3 images) is taken")
    assert note.endswith("takes this (1 image)")
    assert chosen(root, train__annotations=other)[0] == other


@pytest.mark.parametrize(
    "names",
    [
        ("Old/instances_train2017.json", "annotations/instances_train2017.json"),  # equal in name and depth
        ("annotations/a_train.json", "annotations/b_train.json"),  # none has the usual name
        ("train.json", "annotations/instances_train2017.json"),  # the usual name, but deeper
        ("annotations/instances_train2014.json", "annotations/instances_train2017.json"),
    ],
)
def test_two_jsons_that_may_both_be_meant_are_an_error_with_the_way_on(tmp_path, names):
    root = usual(tmp_path)
    (root / "annotations/instances_train2017.json").unlink()
    for count, name in enumerate(names, 1):
        write(root, name, content(count))
    with pytest.raises(InputError) as error:
        detect(root)
    said = str(error.value)
    assert f"{names[0]} (1 image) and {names[1]} (2 images)" in said
    assert "\n" not in said
    for name in names:
        assert f"data.dataset.train.annotations={name}" in said
        assert chosen(root, train__annotations=name)[0] == name


def test_roboflow_names_count_in_the_folder_of_their_split_alone(tmp_path):
    for split in ("train", "valid"):
        images(tmp_path, split)
        write(tmp_path, f"{split}/_annotations.coco.json", content())
    write(tmp_path, "train/a_copy.json", content(1))
    assert detect(tmp_path).dataset.train.annotations == "train/_annotations.coco.json"


def test_two_jsons_without_a_split(tmp_path):
    write(tmp_path, "a.json", content(2))
    write(tmp_path, "b.json", content())
    images(tmp_path, "images")
    with pytest.raises(InputError, match=r"a\.json \(2 images\) and b\.json \(3 images\) may each"):
        detect(tmp_path)
    assert chosen(tmp_path, train__annotations="a.json", val__annotations="b.json") == ("a.json", "b.json")
    assert chosen(tmp_path, val__annotations="b.json") == ("a.json", "b.json")


@pytest.mark.parametrize("name", ["annotations/person_keypoints_train2017.json", "annotations/a_train.json"])
def test_keypoints_give_way(tmp_path, name):
    root = usual(tmp_path)
    (root / "annotations/instances_train2017.json").rename(root / "annotations/z_train.json")
    points = [{**a, "keypoints": [1, 1, 2]} for a in content()["annotations"]]
    write(root, name, content(annotations=points))
    assert detect(root).dataset.train.annotations == "annotations/z_train.json"
    (root / "annotations/z_train.json").unlink()
    assert detect(root).dataset.train.annotations == name


def panoptic(root, split, count=2, masks="annotations/panoptic_{}"):
    maps = [
        {"image_id": n, "file_name": f"{n}.png", "segments_info": [{"id": 5, "category_id": 3}]}
        for n in range(1, count + 1)
    ]
    whole = content(count, annotations=maps, categories=[{"id": 3, "name": "cat", "isthing": 1}])
    write(root, f"annotations/panoptic_{split}2017.json", whole)
    images(root, masks.format(split), range(1, count + 1))


def test_panoptic_beside_instances(tmp_path):
    root = usual(tmp_path)
    for split in ("train", "val"):
        panoptic(root, split)
    found = detect(root)
    assert found.dataset.format == "coco_instance"
    assert any(
        "panoptic_train2017.json is not used: annotations/instances_train2017.json (3 images) is taken"
        in note
        and "data.dataset.format=coco_panoptic takes this (2 images)" in note
        for note in found.notes
    )
    both = ("annotations/panoptic_train2017.json", "annotations/panoptic_val2017.json")
    assert chosen(root, format="coco_panoptic") == both
    assert chosen(root, val__annotations=both[1]) == both
    with pytest.raises(InputError, match=r"annotations are of coco_panoptic, but data\.dataset\.format is"):
        chosen(root, format="coco_instance", val__annotations=both[1])


def test_a_broken_json_of_an_unknown_form_is_not_passed_over(tmp_path):
    root = usual(tmp_path)
    for split in ("train", "val"):
        panoptic(root, split)
    (root / "annotations/panoptic_val2017.json").rename(root / "annotations/val.json")
    write(root, "annotations/val.json", "{")
    with pytest.raises(InputError, match=r"annotations/val\.json: not valid JSON"):
        chosen(root, format="coco_panoptic")


def test_missing_masks_are_what_is_missing(tmp_path):
    for split in ("train", "val"):
        panoptic(tmp_path, split)
        images(tmp_path, f"{split}2017", (1, 2))
    shutil.rmtree(tmp_path / "annotations/panoptic_train")
    with pytest.raises(
        InputError, match=r"panoptic_train2017\.json: its panoptic masks, '1\.png'.*"
    ) as error:
        detect(tmp_path)
    assert str(error.value).endswith("if it holds them: data.dataset.train.panoptic_masks=train2017")
    images(tmp_path, "elsewhere/ids", (1, 2))
    given = {"train": {"panoptic_masks": "elsewhere/ids"}}
    found = detect(tmp_path, given).dataset.train
    assert (found.images, found.panoptic_masks) == ("train2017", "elsewhere/ids")


@pytest.mark.parametrize(
    "folder",
    [
        "train/gt",
        "gtFine/train",
        "train_preview",
        "overlays/train",
        "thumbs",
        "thumbnails/train",
        "vis",
        "visualisations",
        "visualizations/train",
        "train/labels",
        "SegmentationClass",
        "masks",
        "groundTruth",
        "ground_truth/train",
        "trainannot",
        "train_panoptic_masks_preview",
    ],
)
def test_images_are_not_taken_from_folders_that_say_they_hold_others(tmp_path, folder):
    root = usual(tmp_path)
    shutil.rmtree(root / "train2017")
    images(root, folder)
    with pytest.raises(InputError) as error:
        detect(root)
    assert f"are in no folder but {folder}, whose name is that of" in str(error.value)
    assert str(error.value).endswith(f"data.dataset.train.images={folder}")
    assert detect(root, {"train": {"images": folder}}).dataset.train.images == folder
    images(root, "photos")
    assert detect(root).dataset.train.images == "photos"


@pytest.mark.parametrize(
    "folder",
    [
        "unlabeled2017",
        "labels/images",
        "leftImg8bit/train",
        "gtx1080/x/JPEGImages",
        "marigt",
        "VisDrone/train",
    ],
)
def test_images_are_taken_from_other_folders(tmp_path, folder):
    root = usual(tmp_path)
    shutil.rmtree(root / "train2017")
    images(root, folder)
    assert detect(root).dataset.train.images == folder


@pytest.mark.parametrize("top", ["instance_segmentation", "youtube_vis"])
def test_a_folder_of_a_task_that_holds_all(tmp_path, top):
    usual(tmp_path / top)
    assert detect(tmp_path).dataset.train.images == f"{top}/train2017"


def test_a_given_json_is_looked_at_directly(tmp_path):
    root = usual(tmp_path)
    write(root, "a/b/c/d/far.json", content(2))
    assert chosen(root, val__annotations="a/b/c/d/far.json")[1] == "a/b/c/d/far.json"
    with pytest.raises(InputError, match=r"no such file; nearest: .*far\.json \(data\.dataset\.val\.annota"):
        chosen(root, val__annotations="a/b/c/d/fare.json")
    write(root, "a/broken.json", "{")
    with pytest.raises(InputError, match=r"a/broken\.json: not valid JSON.*\(data\.dataset\.val\.annota"):
        chosen(root, val__annotations="a/broken.json")
    # what is broken is no error where another is given
    write(root, "annotations/instances_val2017.json", "{")
    assert chosen(root, val__annotations="a/b/c/d/far.json")[1] == "a/b/c/d/far.json"


def test_a_test_split_is_measured_on_if_it_is_given(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, f"{split}/_annotations.coco.json", content())
        images(tmp_path, split)
    found = detect(tmp_path, {"val": {"annotations": "test/_annotations.coco.json"}}).dataset
    assert (found.val.images, found.val.share) == ("test", (0.0, 1.0))
    assert found.train.images == "train"


def test_shares_that_are_given(tmp_path):
    write(tmp_path, "result.json", content())
    images(tmp_path, "images")

    def shares(**given):
        found = detect(tmp_path, {split: {"share": share} for split, share in given.items()}).dataset
        return found.train.share, found.val.share

    assert shares(train=[0, 0.5]) == ((0.0, 0.5), (0.5, 1.0))
    assert shares(val=[0, 0.3]) == ((0.3, 1.0), (0.0, 0.3))
    assert shares(train=[0, 0.5], val=[0.8, 1]) == ((0.0, 0.5), (0.8, 1.0))
    for unclear in ([0, 1], [0.2, 0.4]):
        with pytest.raises(
            InputError, match=r"data\.dataset\.train\.share=.* says not what is left to 'val'"
        ):
            shares(train=unclear)
    assert shares(train="half") == ((0.0, 0.8), (0.8, 1.0))  # no share: its own check refuses it


def test_one_image_is_no_two_splits(tmp_path):
    write(tmp_path, "result.json", content(1))
    images(tmp_path, "images")
    with pytest.raises(InputError, match=r"its one image .*data\.dataset\.val\.annotations=result\.json$"):
        detect(tmp_path)
    assert chosen(tmp_path, val__annotations="result.json") == ("result.json", "result.json")


def test_one_json_for_images_in_two_folders(tmp_path):
    """The settings that the message proposes leave to each split the images of its folder."""
    write(tmp_path, "annotations.json", content(5))
    images(tmp_path, "train", (1, 2, 3))
    images(tmp_path, "val", (4, 5))
    with pytest.raises(InputError, match=r"those of its images are in annotations\.json") as error:
        detect(tmp_path)
    settings = str(error.value).partition("in its folder: ")[2].split()
    assert settings[-1] == "data.on_bad_sample=skip"
    data = config_at(str(tmp_path), settings).data
    for split, usable in (("train", ["1", "2", "3"]), ("val", ["4", "5"])):
        records = open_split(data, split).records
        assert [record.image_id for record in records if not record.problem] == usable
    # a folder of images that nothing annotates
    write(tmp_path, "annotations.json", content(3))
    with pytest.raises(InputError, match=r"no JSON has its annotations.*train\.share='\[0, 0\.8\]'"):
        detect(tmp_path)
    assert config_at(str(tmp_path), ["data.dataset.train.share=[0, 0.8]"]).data.dataset.val.share == (0.8, 1)


def test_settings_of_the_command_line_reach_the_search(tmp_path, capsys):
    root = usual(tmp_path)
    for name in ("2024", "2025"):
        images(root, name)
    shutil.rmtree(root / "train2017")
    with pytest.raises(
        InputError, match=r"are in 2024 and in 2025; name one: data\.dataset\.train\.images=2024"
    ):
        config_at(str(root), [])
    assert config_at(str(root), ["data.dataset.train.images=2024"]).data.dataset.train.images == "2024"
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(InputError, match="none of 'coco_instance'"):
        config_at(str(root), ["data.dataset.format=coco"])
    # a data set that is given as a whole is not searched for
    assert config_at(str(root), ["data.dataset=coco-instance"]).data.dataset.name == "coco"
    assert capsys.readouterr().out == ""
