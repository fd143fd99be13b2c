"""From images to metrics for every task, independent of how the images are distributed over workers."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import mpformer
from mpformer import config as settings
from mpformer import draw
from mpformer.evaluate.inference import infer, predict_records, to_result
from mpformer.evaluate.metrics import evaluate_predictions, score
from mpformer.evaluate.prediction import FoundInstance, FoundSegments, Prediction
from mpformer.evaluate.truth import true_instances, true_segments
from mpformer.types import InputError, RunError
from tests.evaluate.scenes import CLASSES, ColourModel, as_rle, scenes, tiny_config, tiny_model

TASKS = ("instance", "panoptic", "semantic")


@pytest.fixture(scope="module")
def catalog():
    return scenes(11)


def perfect(record) -> Prediction:
    """The ground truth as a prediction, without crowd regions."""
    truth = true_segments(record)
    kept = np.array([0, *(0 if c else i + 1 for i, c in enumerate(truth.crowd))], np.uint16)
    instances = tuple(
        FoundInstance(t.label, 1.0, t.counts) for t in true_instances(record) if not t.crowd and t.label < 2
    )
    png = draw.encode_png(kept[truth.ids])
    labels = draw.encode_png(np.where(truth.ids > 0, truth.semantic(), 255).astype(np.uint8))
    segments = FoundSegments(png, truth.labels, (1.0,) * len(truth.labels))
    return Prediction(record.image_id, (record.height, record.width), instances, segments, labels)


def test_the_truth_as_prediction_is_100(catalog):
    figures = evaluate_predictions(map(perfect, catalog.records), catalog, "panoptic")
    for name in ("AP", "AP50", "AP75", "PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU", "pixel_accuracy"):
        assert figures[name] == pytest.approx(100), name
    assert all(math.isfinite(v) for v in figures.values())


@pytest.mark.parametrize("task", TASKS)
def test_metrics_do_not_depend_on_the_number_of_workers(catalog, task):
    config, model = tiny_config(task), ColourModel()
    alone = list(predict_records(model, catalog, config))
    shared = [p for rank in (2, 0, 1) for p in predict_records(model, catalog, config, range(rank, 11, 3))]
    assert sorted(shared, key=lambda p: p.image_id) == sorted(alone, key=lambda p: p.image_id)
    figures = score(alone, catalog, task)
    assert score(shared, catalog, task) == figures
    key = {"instance": "AP", "panoptic": "PQ", "semantic": "mIoU"}[task]
    assert 10 < figures.summary[key] < 100


def test_a_panoptic_model_has_all_three_kinds_of_metrics(catalog):
    figures = evaluate_predictions(
        predict_records(ColourModel(), catalog, tiny_config()), catalog, "panoptic"
    )
    assert {"AP", "AP50", "AP_small", "PQ", "PQ_things", "PQ_stuff", "SQ", "RQ", "mIoU"} <= set(figures)


def test_things_are_measured_against_their_own_annotations_where_there_are_some(catalog):
    """AP^Th_pan: with annotations that fill the image, no instance is right, the segments are."""
    moved = [
        replace(r, segments=tuple(replace(s, mask=as_rle(np.ones((r.height, r.width)))) for s in r.segments))
        for r in catalog.records
    ]
    predictions = [perfect(record) for record in catalog.records]
    same = score(predictions, replace(catalog, instances=catalog.records), "panoptic")
    assert same == score(predictions, catalog, "panoptic")
    other = score(predictions, replace(catalog, instances=moved), "panoptic").summary
    assert other["AP"] == 0
    assert other["PQ"] == pytest.approx(100)


def test_a_model_with_random_weights_runs_and_keeps_its_mode(catalog):
    config = tiny_config()
    model = tiny_model(config)
    predictions = list(predict_records(model, catalog.records[:2], config))
    assert [p.image_id for p in predictions] == ["scene-0", "scene-1"]
    assert all(p.instances for p in predictions)
    assert evaluate_predictions(predictions, catalog, "panoptic")["AP"] < 50


def test_an_image_twice_or_unknown_is_an_error(catalog):
    predictions = list(map(perfect, catalog.records))
    with pytest.raises(RunError, match="scene-3 was predicted twice"):
        evaluate_predictions([*predictions, predictions[3]], catalog, "panoptic")
    with pytest.raises(RunError, match="other is not in scenes"):
        evaluate_predictions([replace(predictions[0], image_id="other")], catalog, "panoptic")


def test_nothing_predicted_and_nothing_annotated(catalog):
    empty = FoundSegments(draw.encode_png(np.zeros((72, 100), np.uint16)), (), ())
    record = catalog.records[0]
    void = draw.encode_png(np.full((72, 100), 255, np.uint8))
    nothing = Prediction("scene-0", (72, 100), (), empty, void)
    figures = evaluate_predictions([nothing], catalog, "panoptic")
    assert {figures[k] for k in ("PQ", "mIoU", "pixel_accuracy")} == {0.0}
    bare = replace(catalog, records=[replace(record, segments=())])
    assert evaluate_predictions([nothing], bare, "panoptic") == {}
    assert evaluate_predictions([], catalog, "panoptic") == {}


def test_an_unreadable_image_is_an_error_or_counted(catalog):
    broken = replace(catalog.records[1], image=b"no image")
    some = replace(catalog, records=[catalog.records[0], broken])
    config = tiny_config()
    with pytest.raises(InputError, match="scene-1"):
        list(predict_records(ColourModel(), some, config))
    data = config.data.model_copy(update={"on_bad_sample": "skip"})
    predictions = list(predict_records(ColourModel(), some, config.model_copy(update={"data": data})))
    assert "scene-1" in predictions[1].problem
    figures = evaluate_predictions(predictions, some, "panoptic")
    assert figures["skipped_images"] == 1
    assert {k: v for k, v in figures.items() if k != "skipped_images"} == evaluate_predictions(
        predictions[:1], some, "panoptic"
    )


# --- one image in, one result out ------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_segment_returns_names_masks_and_scores_at_the_size_of_the_image(catalog, task, tmp_path):
    record = catalog.records[4]
    image = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR_RGB)
    resize = settings.TestResize(short=96, long=160)
    result = mpformer.segment(ColourModel(), image, task, resize=resize)
    assert result.size == image.shape[:2]
    assert {s.name for s in result.segments} <= set(CLASSES.names)
    assert all(s.mask.shape == image.shape[:2] and s.mask.any() for s in result.segments)
    expected = true_segments(record).semantic()
    if task == "instance":
        assert all(s.label < 2 for s in result.segments)
        scores = [s.score for s in result.segments]
        assert scores == sorted(scores, reverse=True)
    else:
        assert (result.label_map() == expected).mean() > 0.85
    (tmp_path / "image.png").write_bytes(record.image)
    again = mpformer.segment(ColourModel(), tmp_path / "image.png", task, resize=resize)
    assert [s.score for s in again.segments] == [s.score for s in result.segments]
    assert (again.label_map() == result.label_map()).all()
    assert result.overlay(image).shape[2] == 3


def test_segment_takes_grey_images_and_refuses_what_is_none():
    assert mpformer.segment(
        ColourModel(), np.zeros((40, 50), np.uint8), resize=settings.TestResize(short=64, long=64)
    )
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match="image: "):
            mpformer.segment(ColourModel(), wrong)


def test_a_per_pixel_model_does_semantic_only():
    class PerPixel(ColourModel):
        def forward(self, images, pilots=None, all_heads=False):
            output = super().forward(images)
            head = output.heads[0]
            return replace(
                output, heads=(replace(head, class_logits=None, mask_logits=head.mask_logits[:, :4]),)
            )

    record = scenes(1).records[0]
    config = tiny_config("semantic")
    prediction = next(predict_records(PerPixel(), [record], config))
    labels = to_result(prediction, CLASSES).label_map()
    assert (labels == true_segments(record).semantic()).mean() > 0.85
    with pytest.raises(InputError, match="semantic"):
        infer(
            PerPixel(),
            [np.zeros((32, 32, 3), np.uint8)],
            "panoptic",
            settings.TestResize(),
            config.evaluate,
            torch.device("cpu"),
        )
