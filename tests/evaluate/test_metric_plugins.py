"""`evaluate.metrics`: metrics from outside the package, wherever a model is evaluated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mpformer.cli.main import main
from mpformer.config import Config, build_config, load_config, run_name
from mpformer.config.yamlfile import Source
from mpformer.data import synthetic
from mpformer.data.catalog import open_split
from mpformer.evaluate.evaluation import evaluate, measure
from mpformer.evaluate.prediction import FoundInstance
from mpformer.evaluate.truth import true_instances
from mpformer.model.architecture import build_model
from mpformer.plugin import FOLDER_VARIABLE
from mpformer.train import checkpoint, launch
from mpformer.types import InputError, RunError
from tests.evaluate.scenes import ColourModel, scenes, tiny_config
from tests.evaluate.test_inference import perfect

ROOT = Path(__file__).parents[2]
COUNT = {"kind": "count_error:CountError", "options": {"min_score": 0.6}}

MODULE = """
class Clash:
    def update(self, prediction, truth): ...
    def compute(self):
        return {"AP": 1.0}

class Text(Clash):
    def compute(self):
        return {"quality": "good"}

class Undefined(Clash):
    def compute(self):
        return {"nothing": float("nan"), "images": 2}

class Failing(Clash):
    def update(self, prediction, truth):
        raise KeyError("nothing")

class Empty(Clash):
    def compute(self): ...

class Nameless(Clash):
    def compute(self):
        return {3: 1.0}

class NoMetric:
    def update(self, prediction, truth): ...
"""


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins are imported from the folder of the documentation's examples."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(ROOT / "docs" / "examples"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "odd_metrics.py").write_text(MODULE)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "odd_metrics", raising=False)


def with_metrics(config: Config, *metrics: object) -> Config:
    tree = config.model_dump(mode="json")
    tree["evaluate"]["metrics"] = list(metrics)
    return build_config(Source(Path("test.yaml"), tree, {}))


def test_a_metric_gets_each_image_once_with_its_truth_and_its_options(examples):
    """The truth as prediction; one object is removed, one scores too little, one more is confident."""
    catalog, config = scenes(6), with_metrics(tiny_config("instance"), COUNT)
    predictions = [perfect(record) for record in catalog.records]
    first, second = [i for i, p in enumerate(predictions) if p.instances][:2]
    removed, faint = predictions[first].instances, predictions[second].instances
    predictions[first] = replace(predictions[first], instances=removed[1:])
    more = FoundInstance(0, 0.61, true_instances(catalog.records[second])[0].counts)
    faint = (replace(faint[0], score=0.59), *faint[1:], more)
    predictions[second] = replace(predictions[second], instances=faint)
    changes = 1 + (0 if faint[0].label == 0 else 2)  # within a class the two changes cancel out
    values = measure(reversed(predictions), catalog, config).values()
    assert values["val/count_error"] == pytest.approx(changes / 6)
    assert "val/AP" in values


def test_metrics_are_the_same_in_every_evaluation_and_start_anew_in_each(examples):
    catalog, config = scenes(4), with_metrics(tiny_config(), COUNT)
    first, _ = evaluate(ColourModel(), catalog, config)
    again, _ = evaluate(ColourModel(), catalog, config)
    assert first.values()["val/count_error"] == again.values()["val/count_error"] > 0
    without, _ = evaluate(ColourModel(), catalog, tiny_config())
    assert without.values().items() < first.values().items()


def test_a_metric_does_not_change_the_run_it_measures(examples):
    assert run_name(with_metrics(tiny_config(), COUNT)) == run_name(tiny_config())
    assert run_name(with_metrics(tiny_config(), "nowhere:Metric")) == run_name(tiny_config())


def test_the_command_line_evaluates_with_a_metric(examples, tmp_path, capsys):
    synthetic.generate(tmp_path / "data", images={"train": 1, "val": 2}, size=64)
    recipe = ROOT / "experiments/recipes/synthetic-panoptic-tiny.yaml"
    config = load_config(str(recipe), [f"data.root={tmp_path / 'data'}"])
    model = build_model(config.model, open_split(config.data, "val").classes)
    checkpoint.save_weights(tmp_path / "model.safetensors", model, config)
    settings = ["evaluate.metrics=[count_error:CountError]", "evaluate.pictures=0"]
    assert main(["evaluate", str(tmp_path / "model.safetensors"), *settings]) == 0
    assert "count_error " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("odd_metrics:Clash", RunError, "evaluate.metrics.0: odd_metrics:Clash: .*'AP' already"),
        ("odd_metrics:Failing", RunError, "evaluate.metrics.0: odd_metrics:Failing: KeyError: 'nothing'"),
        ("odd_metrics:Empty", RunError, "odd_metrics:Empty: `compute` must return values by name, not None"),
        ("odd_metrics:Nameless", RunError, "odd_metrics:Nameless: the name .* must be a text, not 3"),
        ("odd_metrics:Text", RunError, "evaluate.metrics.0: odd_metrics:Text: .*'quality' must be a number"),
        (
            "odd_metrics:NoMetric",
            InputError,
            r"metrics.0: .* lacks the method compute\(\) of Metric",
        ),
        ("AP", InputError, "evaluate.metrics.0: the built-in metrics are always computed.*'AP'"),
    ],
)
def test_an_unusable_metric_is_one_clear_error(module, metric, error, message):
    catalog = scenes(4)
    with pytest.raises(error, match=message):
        measure(map(perfect, catalog.records), catalog, with_metrics(tiny_config("instance"), metric))


def test_an_undefined_value_is_left_out(module):
    values = measure([], scenes(1), with_metrics(tiny_config(), "odd_metrics:Undefined")).values()
    assert values == {"val/images": 2.0}


def test_training_refuses_an_unusable_metric_before_anything_starts(module, tmp_path):
    config = with_metrics(tiny_config(), {"kind": "odd_metrics:Clash", "options": {"wrong": 1}})
    config = config.model_copy(update={"storage": str(tmp_path / "runs")})
    with pytest.raises(InputError, match=r"evaluate.metrics.0: odd_metrics:Clash"):
        launch.fit(config)
    assert not (tmp_path / "runs").exists()
