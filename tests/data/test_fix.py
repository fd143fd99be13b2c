"""`data check --fix`: what can be meant in one way only is mended, and nothing else is touched."""

import json

import pytest

from mpformer.cli.main import main
from mpformer.config import Packed
from mpformer.data.catalog import open_split
from mpformer.data.fix import mend
from mpformer.data.masks import record_masks
from mpformer.types import InputError
from tests.data.folders import SQUARE, annotation, coco_folder


def test_nothing_is_written_where_nothing_is_wrong(tmp_path):
    data = coco_folder(tmp_path / "set")
    mended = mend(data, tmp_path / "out")
    assert mended.data == data
    assert mended.lines == (f"{tmp_path / 'set' / 'train.json'}: nothing to mend",)
    assert not (tmp_path / "out").exists()


def test_what_can_be_mended_gives_the_data_that_were_meant(tmp_path):
    right = coco_folder(tmp_path / "right", images=4)
    pairs = [[[x, y] for x, y in zip(SQUARE[::2], SQUARE[1::2])]]
    wrong = coco_folder(
        tmp_path / "wrong",
        [
            annotation("11", 1.0, segmentation=SQUARE, area="300"),
            annotation(11, "2", category_id="3", iscrowd="0"),
            annotation(None, 3, category_id="cat"),
            annotation(14, 4, segmentation=pairs),
            annotation(15, 4, segmentation=pairs),  # the same object once more
        ],
        image_changes={
            1: {"file_name": r"images\1.PNG", "width": "60"},
            2: {"height": None},
            3: {"width": 60.0, "id": 3.0},
        },
        content={
            "categories": [
                {"id": "3", "name": "cat", "isthing": "1"},
                {"id": 7, "name": "dog", "isthing": 1},
            ]
        },
    )
    source = tmp_path / "wrong" / "train.json"
    content = json.loads(source.read_text())
    content["images"].append(content["images"][3])
    source.write_text(json.dumps(content))
    before = source.read_bytes()
    mended = mend(wrong, tmp_path / "out")
    told = "\n".join(mended.lines)
    for kind in (
        *("file names", "ids of images", "polygons wrapped", "pairs made flat", "objects annotated twice"),
        *(
            "images listed twice",
            "sizes read from the files",
            "ids of annotations",
            "numbers in another form",
        ),
        "names of classes in the place of ids",
    ):
        assert kind in told
    assert source.read_bytes() == before
    ours, truth = open_split(mended.data, "train"), open_split(right, "train")
    assert ours.findings == ()
    assert ours.classes == truth.classes
    assert len(ours) == len(truth) == 4
    for a, b in zip(ours.records, truth.records):
        assert (a.image_id, a.width, a.height, a.problem) == (b.image_id, b.width, b.height, "")
        assert [(s.label, s.crowd, s.area) for s in a.segments] == [
            (s.label, s.crowd, s.area) for s in b.segments
        ]
        assert (record_masks(a) == record_masks(b)).all()
    ids = [s.id for r in ours.records for s in r.segments]
    assert len(set(ids)) == 4
    assert mend(mended.data, tmp_path / "again").lines[0].endswith("nothing to mend")


def test_what_may_be_meant_in_two_ways_is_left(tmp_path, capsys):
    data = coco_folder(
        tmp_path / "set",
        [annotation(1, 99), annotation(2, 1, category_id=8), annotation(3, 2, segmentation=[[1, 2, 3]])],
        images=2,
        image_changes={2: {"file_name": "gone.png"}},
    )
    assert "nothing to mend" in mend(data, tmp_path / "out").lines[0]
    (tmp_path / "set" / "train.json").rename(tmp_path / "set" / "result.json")
    arguments = [str(tmp_path / "set"), "--fix", str(tmp_path / "out")]
    assert main(["data", "check", *arguments]) == 2
    said = capsys.readouterr().out
    assert "image_id 99 is not the id of any image" in said
    assert "unknown category 8" in said
    assert "'gone.png': no such file" in said


def test_names_of_stuff_and_crowds_as_the_settings_say(tmp_path):
    data = coco_folder(tmp_path / "set", [annotation(1, 1, iscrowd=1)], images=1)
    dataset = data.dataset.model_copy(update={"stuff": ("dog",), "ignore_iscrowd": True})
    mended = mend(data.model_copy(update={"dataset": dataset}), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [c["isthing"] for c in content["categories"]] == [1, 0]
    assert content["annotations"][0]["iscrowd"] == 0
    assert mended.settings == (
        f"data.dataset.train.annotations={tmp_path / 'out' / 'train.json'}",
        f"data.dataset.val.annotations={tmp_path / 'out' / 'train.json'}",
    )


def test_the_originals_are_never_replaced(tmp_path):
    data = coco_folder(tmp_path, [annotation(1, 1, segmentation=SQUARE)], images=1)
    before = (tmp_path / "train.json").read_bytes()
    with pytest.raises(InputError, match="the mended copy would replace"):
        mend(data, tmp_path)
    assert (tmp_path / "train.json").read_bytes() == before
    packed = data.model_copy(update={"dataset": Packed()})
    with pytest.raises(InputError, match="--fix: data in COCO's form are expected, not 'packed'"):
        mend(packed, tmp_path / "out")
