"""Classes that come in pairs of left and right."""

from __future__ import annotations

import pytest

from mpformer.config import Data
from mpformer.data.check import check
from mpformer.data.mirrored import mirrored, mirrored_pairs
from tests.data.folders import coco_folder


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["left_eye", "right_eye", "nose"], [("left_eye", "right_eye")]),
        (["R hand", "L hand"], [("L hand", "R hand")]),
        (["back_left_door", "back_right_door"], [("back_left_door", "back_right_door")]),
        (["EyeLeft", "eyeRight"], [("EyeLeft", "eyeRight")]),
        (["LEFT-ARM", "RIGHT-ARM"], [("LEFT-ARM", "RIGHT-ARM")]),
        (["lefteye", "righteye"], [("lefteye", "righteye")]),
        (["foot.l", "foot.r"], [("foot.l", "foot.r")]),
        (["left_eye", "nose"], []),
        (["lamp", "ramp"], []),
        (["cleft", "bright"], []),
        (["pelican", "perican"], []),
        (["left", "left"], []),
    ],
)
def test_pairs_differ_in_the_side_alone(names: list[str], pairs: list[tuple[str, str]]) -> None:
    assert mirrored_pairs(names) == pairs


def test_flips_are_named_with_the_setting_that_turns_them_off(tmp_path) -> None:
    sides = [{"id": 3, "name": "left wing"}, {"id": 7, "name": "right wing"}]
    data = coco_folder(tmp_path, content={"categories": sides})
    [found] = [f for f in check(data)["train"].findings if f.kind == "classes that a flip exchanges"]
    assert found.text == (
        "left wing and right wing: 50% of the training images are flipped, which turns left into right but "
        "not the class: data.augment.flip=0 turns the flip off"
    )
    still = Data.model_validate({**data.model_dump(), "augment": {"size": [64, 64], "flip": 0}})
    assert not any("flip" in f.kind for f in check(still)["train"].findings)
    assert mirrored(["left", "right"], still) == ()
