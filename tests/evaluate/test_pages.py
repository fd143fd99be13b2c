"""The evaluation page: worst images first, self-contained."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest

from mpformer import draw
from mpformer.evaluate import instance, pages
from mpformer.evaluate.confusion import total
from mpformer.evaluate.evaluation import measure
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.instance import ImageInstances, TrueInstance, match_instances
from mpformer.evaluate.pages import picture, rate, worst_first, write_page
from mpformer.evaluate.prediction import FoundInstance
from mpformer.evaluate.truth import true_instances, true_segments
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
    matches = match_instances(ImageInstances(size, truth, found))
    true, labels = (np.array([one.label for one in side]) for side in (truth, found))
    counts = matches.counts(true, labels, 2)
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
    sheet = picture(rate(only(perfect(record), task), record, CLASSES), CLASSES)
    half = (sheet.shape[1] - 8) // 2
    strip = sheet.shape[0] - round(record.height * half / record.width)
    left, right = sheet[strip:, :half].astype(int), sheet[strip:, -half:].astype(int)
    crowd = any(true_segments(record).crowd)
    assert crowd or abs(left - right).mean() < 6  # captions of the prediction bear scores


def test_the_page_is_self_contained(catalog, tmp_path):
    config, folder = tiny_config(), tmp_path / "new" / "folder"
    evaluation = measure(predict_records(ColourModel(), catalog, config), catalog, config)
    files = write_page(folder, "A <title> & more", evaluation, count=4, facts={"images/s": "7.5"})
    names = [f.name.split("-")[0] for f in files]
    assert names == ["evaluation.html", "01", "02", "03", "04", "classes.csv", "confusion.csv"]
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
    places = [page.index(f"<h2>{heading}") for heading in ("Classes", "Confusion", "Worst images first")]
    assert places == sorted(places)


def test_losses_are_shown_and_those_of_the_averaged_weights(catalog, tmp_path):
    config = tiny_config()
    evaluation = measure(predict_records(ColourModel(), catalog, config), catalog, config)
    assert "losses" not in write_page(tmp_path, "a", evaluation)[0].read_text()
    with_losses = replace(evaluation, losses={"loss": 31.2344, "loss_mask": 0.00061})
    averaged = replace(evaluation, losses={"loss": 29.5})
    page = write_page(tmp_path, "a", with_losses, averaged=averaged)[0].read_text()
    assert "6 images; metrics in percent, losses as in training." in page
    for name, value in (("loss", "31.234"), ("loss_mask", "0.001"), ("loss of the average", "29.500")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert f"<dt>PQ of the average</dt><dd>{evaluation.scores.summary['PQ']:.1f}</dd>" in page


def test_no_images_still_make_a_page(catalog, tmp_path):
    files = write_page(tmp_path, "empty", measure([], catalog, tiny_config("instance")))
    assert [f.name for f in files] == ["evaluation.html", "classes.csv", "confusion.csv"]
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

    def picture_of(rating, classes):
        monkeypatch.setattr(pages, "_LARGEST", largest[rating.record.image_id])
        return drawn(rating, classes)

    monkeypatch.setattr(pages, "picture", picture_of)
    files = write_page(tmp_path / "page", "title", evaluation)
    assert [f.name for f in files[:-2]] == ["evaluation.html", f"01-{first.image_id}.jpg"]
    assert [m.split(":")[0] for m in caplog.messages] == [
        f"picture of image {one.image_id}" for one in (second, third)
    ]
    assert "too many for a picture" in caplog.messages[0]
    assert "gone.png: no such file" in caplog.messages[1]


def test_names_of_files_from_ids_of_images():
    assert pages.file_stem("../a b/ü.png") == ".._a_b_ü.png"
    assert len(pages.file_stem("𠀀" * 300).encode()) == 200
    assert pages.file_stem("x" * 300 + "end").endswith("xend")


def confused(record):
    """The first thing is found as the other class of things, one is missed, one is where nothing is."""
    good = perfect(record)
    first, second, *rest = good.instances
    nothing = np.zeros(good.size, bool)
    nothing[:3, :3] = True
    found = (
        replace(first, label=1 - first.label),
        *rest,
        FoundInstance(0, 0.9, instance.encode_mask(nothing)),
    )
    return good, replace(only(good, "instance"), instances=found), (first.label, second.label)


def test_the_confusion_matrix_and_the_frames_say_what_was_taken_for_what(catalog):
    record = next(r for r in catalog.records if len(perfect(r).instances) > 2)
    good, prediction, (first, second) = confused(record)
    rating = rate(prediction, record, CLASSES)
    matrix = total([rating.outcomes], 4)
    expected = np.zeros((5, 5), int)
    for one in good.instances[2:]:
        expected[one.label, one.label] += 1
    expected[first, 1 - first] += 1
    expected[second, 4] += 1
    expected[4, 0] += 1
    assert matrix.tolist() == expected.tolist()
    true = [one.label for one in true_instances(record)]
    assert [true[i] for i in sorted(rating.missed)] == [first, second]
    assert rating.false == {0, len(prediction.instances) - 1}
    frames = (picture(rating, CLASSES) == (230, 30, 30)).all(axis=2)
    assert frames[:, : frames.shape[1] // 2].any()
    assert frames[:, frames.shape[1] // 2 :].any()
    assert (
        not (picture(rate(only(good, "instance"), record, CLASSES), CLASSES) == (230, 30, 30))
        .all(axis=2)
        .any()
    )


def test_panoptic_segments_of_the_wrong_class_are_confused_not_only_missed(catalog):
    record = catalog.records[0]
    good = perfect(record)
    labels = list(good.panoptic.labels)
    sky = labels.index(2)
    labels[sky] = 3
    rating = rate(replace(good, panoptic=replace(good.panoptic, labels=tuple(labels))), record, CLASSES)
    matrix = total([rating.outcomes], 4)
    assert matrix[2, 3] == 1
    assert matrix.sum() == sum(not crowd for crowd in true_segments(record).crowd)
    assert (rating.missed, rating.false) == ({sky}, {sky})


def test_tables_by_class_are_csv(catalog, tmp_path):
    semantic = [only(perfect(r), "semantic") for r in catalog.records]
    evaluation = measure(semantic, catalog, tiny_config("semantic"))
    page, *_, by_class, matrix = write_page(tmp_path, "t", evaluation, count=0)
    rows = list(csv.DictReader(by_class.open()))
    assert [row["class"] for row in rows] == list(CLASSES.names)
    assert all(float(row["IoU"]) == 100 and row["true"] == row["right"] for row in rows)
    header, *lines = csv.reader(matrix.open())
    assert header == ["true \\ found", *CLASSES.names, "none"]
    pixels = np.array([line[1:] for line in lines], int)
    labelled = sum(int((true_segments(r).semantic() >= 0).sum()) for r in catalog.records)
    assert (np.diag(np.diag(pixels)) == pixels).all()
    assert pixels.sum() == labelled
    assert "Pixels by true class" in page.read_text()
