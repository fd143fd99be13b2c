"""The evaluation page: worst images first, self-contained."""

import re
from dataclasses import replace

import numpy as np
import pytest

from mpformer import draw
from mpformer.evaluate import instance, pages
from mpformer.evaluate.evaluation import measure
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.instance import ImageInstances, TrueInstance, count_instances
from mpformer.evaluate.pages import picture, rate, worst_first, write_page
from mpformer.evaluate.prediction import FoundInstance
from mpformer.evaluate.truth import true_segments
from tests.evaluate.scenes import CLASSES, ColourModel, scenes, tiny_config
from tests.evaluate.test_inference import perfect

TASKS = ("instance", "panoptic", "semantic")


@pytest.fixture(scope="module")
def catalog():
    return scenes(6, seed=2)


def only(prediction, task):
    """The results of one task alone, as its model gives them."""
    unused = {"instance": ("panoptic", "semantic"), "panoptic": (), "semantic": ("panoptic", "instances")}
    return replace(prediction, **dict.fromkeys(unused[task]))


def spoiled(record):
    """Nothing found but one wrong object; every pixel of the wrong class."""
    height, width = record.height, record.width
    mask = np.zeros((height, width), bool)
    mask[:4, :4] = True
    good = perfect(record)
    ids = draw.encode_png(mask.astype(np.uint16))
    return replace(
        good,
        instances=(FoundInstance(0, 0.9, instance.encode_mask(mask)),),
        panoptic=replace(good.panoptic, png=ids, labels=(0,), scores=(0.9,)),
        semantic=draw.encode_png(np.zeros((height, width), np.uint8)),
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_worst_image_comes_first(catalog, task):
    predictions = [spoiled(r) if i == 3 else perfect(r) for i, r in enumerate(catalog.records)]
    rated = worst_first(measure([only(p, task) for p in predictions], catalog, tiny_config(task)))
    assert rated[0].record.image_id == "scene-3"
    assert rated[0].quality < 0.2
    assert all(r.quality is None or r.quality == pytest.approx(1) for r in rated[1:])
    assert len(rated) == 6


def test_instances_are_counted_by_hand():
    """One disc matched, not by a second of IoU 0.5; one below the score; a false box, and one in a crowd."""
    size = (20, 60)

    def box(left, right):
        mask = np.zeros(size, bool)
        mask[:, left:right] = True
        return instance.encode_mask(mask)

    truth = [
        TrueInstance(0, False, box(0, 10), 200),
        TrueInstance(0, False, box(20, 30), 200),
        TrueInstance(1, True, box(40, 60), 400),
    ]
    found = [
        FoundInstance(0, 0.7, box(0, 20)),
        FoundInstance(0, 0.9, box(0, 10)),
        FoundInstance(1, 0.8, box(10, 20)),
        FoundInstance(1, 0.8, box(45, 55)),
        FoundInstance(0, 0.4, box(20, 30)),
    ]
    counts = count_instances(ImageInstances(size, truth, found), 2)
    assert counts.true_positives.tolist() == [1, 0]
    assert counts.iou.tolist() == [1, 0]
    assert counts.false_positives.tolist() == [1, 1]
    assert counts.false_negatives.tolist() == [1, 0]


def test_an_image_without_anything_has_no_quality_and_comes_last(catalog):
    bare = replace(catalog.records[0], segments=())
    empty = replace(spoiled(bare), instances=())
    assert rate(only(empty, "instance"), bare, CLASSES).quality is None
    assert rate(only(empty, "semantic"), bare, CLASSES).quality is None
    records = [bare, *catalog.records[1:]]
    predictions = [empty, *map(perfect, catalog.records[1:])]
    only_instances = [only(p, "instance") for p in predictions]
    changed = replace(catalog, records=records)
    rated = worst_first(measure(only_instances, changed, tiny_config("instance")))
    without = [r.quality is None for r in rated]
    assert without == sorted(without)
    assert "scene-0" in [r.record.image_id for r in rated if r.quality is None]


@pytest.mark.parametrize("task", TASKS)
def test_prediction_and_truth_are_shown_side_by_side(catalog, task):
    record = catalog.records[1]
    sheet = picture(only(perfect(record), task), record, CLASSES)
    half = (sheet.shape[1] - 8) // 2
    strip = sheet.shape[0] - round(record.height * half / record.width)
    left, right = sheet[strip:, :half].astype(int), sheet[strip:, -half:].astype(int)
    crowd = any(true_segments(record).crowd)
    assert crowd or abs(left - right).mean() < 6  # captions of the prediction bear scores


def test_the_page_is_self_contained(catalog, tmp_path):
    config, folder = tiny_config(), tmp_path / "new" / "folder"
    evaluation = measure(predict_records(ColourModel(), catalog, config), catalog, config)
    files = write_page(folder, "A <title> & more", evaluation, count=4, facts={"images/s": "7.5"})
    assert [f.name.split("-")[0] for f in files] == ["evaluation.html", "01", "02", "03", "04"]
    assert all(f.exists() for f in files)
    page = files[0].read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "A &lt;title&gt; &amp; more" in page
    assert f"<dt>PQ</dt><dd>{evaluation.scores.summary['PQ']:.1f}</dd>" in page
    assert "<dt>images/s</dt><dd>7.5</dd>" in page
    order = re.findall(r"<figcaption><b>(.*?)</b> quality (\d+)%", page)
    assert [int(q) for _, q in order] == sorted(int(q) for _, q in order)
    for name in CLASSES.names:
        assert f"<td>{name}</td>" in page


def test_no_images_still_make_a_page(catalog, tmp_path):
    files = write_page(tmp_path, "empty", measure([], catalog, tiny_config("instance")))
    assert len(files) == 1
    assert "No images" in files[0].read_text()


def test_a_picture_that_fails_is_left_out(catalog, tmp_path, monkeypatch, caplog):
    """Of three images the second is too large, and the file of the third is gone."""
    config = tiny_config("instance")
    evaluation = measure(predict_records(ColourModel(), catalog, config, range(3)), catalog, config)
    first, second, third = (one.record for one in worst_first(evaluation))
    missing = replace(third, image=str(tmp_path / "gone.png"))
    records = [missing if r.image_id == third.image_id else r for r in catalog.records]
    evaluation = replace(evaluation, catalog=replace(catalog, records=records))
    largest = {first.image_id: 10**9, second.image_id: 1, third.image_id: 10**9}
    drawn = pages.picture

    def picture_of(prediction, record, classes):
        monkeypatch.setattr(pages, "_LARGEST", largest[record.image_id])
        return drawn(prediction, record, classes)

    monkeypatch.setattr(pages, "picture", picture_of)
    files = write_page(tmp_path / "page", "title", evaluation)
    assert [f.name for f in files] == ["evaluation.html", f"01-{first.image_id}.jpg"]
    assert [m.split(":")[0] for m in caplog.messages] == [
        f"picture of image {one.image_id}" for one in (second, third)
    ]
    assert "too many for a picture" in caplog.messages[0]
    assert "gone.png: no such file" in caplog.messages[1]


def test_names_of_files_from_ids_of_images():
    assert pages.file_stem("../a b/ü.png") == ".._a_b_ü.png"
    assert len(pages.file_stem("𠀀" * 300).encode()) == 200
    assert pages.file_stem("x" * 300 + "end").endswith("xend")
