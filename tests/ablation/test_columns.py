"""What a study's columns may name is what an evaluation measures."""

import pytest

from mpformer.ablation.spec import load_study
from mpformer.config.figures import FIGURES
from mpformer.evaluate.inference import predict_records
from mpformer.evaluate.metrics import evaluate_predictions
from mpformer.types import InputError
from tests.evaluate.scenes import ColourModel, scenes, tiny_config


@pytest.mark.parametrize("task", FIGURES)
def test_every_figure_of_an_evaluation_may_be_a_column_and_no_other(task):
    catalog = scenes(12, size=(160, 220))
    predictions = list(predict_records(ColourModel(), catalog, tiny_config(task), range(12), "cpu"))
    found = evaluate_predictions(predictions, catalog, task, boundary=task != "semantic").keys()
    # these scenes have no object of more than 96 x 96 pixels
    assert found <= set(FIGURES[task])
    assert set(FIGURES[task]) - found <= {"AP_large", "AP_boundary_large", "AR_large"}


def test_a_column_must_fit_the_task_of_its_part(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {task: semantic}\n")
    study = tmp_path / "study.yaml"
    study.write_text(
        "title: A study\nbase: recipe.yaml\nbaseline: a\nrows: {a: {}}\ncolumns:\n  val/AP: {title: AP}\n"
    )
    with pytest.raises(InputError, match=r"study\.yaml:6: columns\.val/AP: no metric 'val/AP' of the task"):
        load_study(study)
