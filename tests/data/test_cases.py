"""Inputs as other tools write them (the folder `cases` beside the sample data): each has its right outcome.

Skipped where the folder is absent; `test_detect.py`, `test_fix.py`, `test_obstacles.py` and `test_names.py`
make inputs of the same kinds themselves.
"""

import os
import shutil
from pathlib import Path

import pytest

from mpformer.cli.main import main

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "experiments" / "recipes"

CASES = {
    "c01-roboflow": (
        0,
        ["test/_annotations.coco.json is not used: a test split", "val: 3 images", "=valid/"],
    ),
    "c02-cvat-all-crowd": (
        2,
        ["nothing to learn: 1", "nothing to measure: 1", "data.dataset.ignore_iscrowd=true"],
    ),
    "c03-labelstudio-windows": (
        0,
        [r"'images\ab12-0.png' is taken to be images/ab12-0.png", "share=[0, 0.8]"],
    ),
    "c05-train-json-cut": (2, ["instances_train2017.json: not valid JSON", "annotations of 'train'"]),
    "c05c-val-no-annotations": (
        2,
        ["instances_val2017.json: 'annotations' is empty", "annotations of 'val'"],
    ),
    "c06b-category-id-str": (0, ["'category_id' '1' is taken as 1", "numbers that are written as text"]),
    "c06j-annotation-of-no-image": (2, ["annotation 5000: image_id 777 is not the id", "annotation 5001"]),
    "c06k-image-missing": (2, ["image 1: 'train0.png': no such file", "image 101: 'val0.png': no such file"]),
    "c07a-flat-polygon": (2, ["one flat list; wrap it: [[x, y, ...]]", "annotation 1005"]),
    "c07g-normalised-coordinates": (2, ["fractions of the image's size", "multiply x by the width"]),
    "c08a-class-names-odd": (0, ["no problems found", "samples of train"]),
    "c08b-class-names-double": (2, ["categories 1 and 2 are both named 'disk'"]),
    "c09d-extension-case": (0, ["'val0.PNG' is taken to be val2017/val0.png", "train on it"]),
    "c10a-tiff-12-of-16-bit": (2, ["has a value above 4095", "set data.bits=12"]),
    "c20-panoptic-control": (
        0,
        ["train: 6 images, 18 objects", "mpformer train laptop-panoptic data.root="],
    ),
    "c20a-no-isthing": (2, ["has no 'isthing'", "data.dataset.stuff=[NAME, ...]"]),
    "c20c-grey16-ids": (2, ["the id map is grey, 16-bit", "no image that can be used"]),
    "c21a-binary-255-ignored": (2, ["the ignored value 255 covers", "value of 'building' (now 1)"]),
    "c22b-nuclei-appledouble": (0, ["files that a system left, passed over: 20"]),
    "c23a-nuclei-huge": (2, ["the mask is 96x96, but its image is 14000x13000", "cannot be used: 1"]),
    "c25b-strip-4000x8": (0, ["sizes 4000 to 4000 wide, 8 to 8 high", "samples of train"]),
    "c27-five-bands": (2, ["a TIFF image of 5 channels", "no image that can be used"]),
    "c28-via": (2, ["one flat list; wrap it", "'image_id' '1' is taken as 1"]),
}
"""Exit code of `mpformer data check` and parts of what it says."""
WITH_SETTINGS = {
    "c02-cvat-all-crowd": ["data.dataset.ignore_iscrowd=true"],
    "c06j-annotation-of-no-image": ["data.on_bad_sample=skip"],
    "c06k-image-missing": ["data.on_bad_sample=skip"],
    "c10a-tiff-12-of-16-bit": ["data.bits=12"],
    "c20a-no-isthing": ["data.dataset.stuff=[ground]"],
    "c21a-binary-255-ignored": [
        "data.dataset.classes=[{id: 0, name: background}, {id: 255, name: building}]",
        "data.dataset.ignore=[]",
    ],
    "c23a-nuclei-huge": ["data.on_bad_sample=skip"],
}
"""Settings that the message of a case names: with them nothing is in the way."""
MENDED = ["c06b-category-id-str", "c07a-flat-polygon", "c09d-extension-case", "c28-via"]
"""Cases of which `--fix` leaves nothing to say."""


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A function that returns what to check for a case, in an empty working folder."""
    usual = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MPFORMER_SAMPLE_DATA", usual)).parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}: they lie beside the sample data (MPFORMER_SAMPLE_DATA)")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def arguments(name):
        if name.startswith("c21"):
            shutil.copytree(folder / name, "set")
            shutil.copy(RECIPES / "camvid.yaml", "set")
            return ["set/recipe.yaml", "data.root=set"]
        if name.startswith(("c22", "c23")):
            return ["nuclei", f"data.root={folder / name}"]
        return [str(folder / name)]

    return arguments


def said(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out + captured.err


@pytest.mark.parametrize("name", CASES)
def test_the_outcome_of_a_case(case, capsys, name):
    code, parts = CASES[name]
    assert main(["data", "check", *case(name)]) == code
    text = said(capsys)
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_what_the_message_says_to_set_is_right(case, capsys, name):
    assert main(["data", "check", *case(name), *WITH_SETTINGS[name]]) == 0
    text = said(capsys)
    assert "train on it: " in text
    assert "nothing to" not in text


@pytest.mark.parametrize("name", MENDED)
def test_a_mended_copy_has_nothing_wrong(case, capsys, tmp_path, name):
    assert main(["data", "check", *case(name), "--fix", str(tmp_path / "mended")]) == 0
    text = said(capsys)
    assert text.count("no problems found") == 2
    assert str(tmp_path / "mended" / "annotations") in text
