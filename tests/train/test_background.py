"""Evaluations in the background: each is in the record once, whenever the run is cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpformer.model.architecture import build_model
from mpformer.model.weights.loading import load_checkpoint
from mpformer.tracking.entry import Entry
from mpformer.tracking.record import read_metrics
from mpformer.tracking.tracker import Tracker
from mpformer.train import background, checkpoint
from mpformer.train.background import BackgroundEvaluator
from mpformer.types import InputError

pytestmark = pytest.mark.slow

Opened = Callable[[int], tuple[BackgroundEvaluator, Tracker]]


@pytest.fixture(scope="module")
def one_cpu_ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def opened(one_cpu_ray, tmp_path, tiny_config, monkeypatch) -> Opened:
    """A start of the run: `opened(start)`. Evaluation is replaced: its figure is a bias of the weights."""
    import ray

    def bias(_val, _config, weights: Path) -> dict[str, float]:
        return {"val/PQ": float(load_checkpoint(weights)[0].decoder.class_embed.bias[0])}

    monkeypatch.setattr(background, "_evaluate", bias)
    names = {"entry": Entry("tiny"), "mlflow_uri": None, "run_name": "tiny"}

    def start(step: int) -> tuple[BackgroundEvaluator, Tracker]:
        tracker = Tracker.open(tmp_path, tiny_config, start_step=step, **names)
        return BackgroundEvaluator(tmp_path, tiny_config, ray.put(None), tracker), tracker

    return start


def weights(config, figure: float):
    """A model whose evaluation comes to that figure."""
    model = build_model(config.model, 3)
    model.decoder.class_embed.bias.data[0] = figure
    return model


def waiting(run_dir: Path) -> list[int]:
    return [int(path.stem[-8:]) for path in sorted((run_dir / "evaluations").glob("step-*"))]


def test_figures_stand_under_their_step_and_weights_stay_until_a_checkpoint(opened, tmp_path, tiny_config):
    evaluations, tracker = opened(0)
    evaluations.submit(4, weights(tiny_config, 0.25))
    tracker.log(5, {"train/loss": 1.0})
    evaluations.submit(8, weights(tiny_config, 0.5))  # waits for the one before
    assert read_metrics(tmp_path) == [(4, {"val/PQ": 0.25}), (5, {"train/loss": 1.0})]
    assert waiting(tmp_path) == [4, 8]
    evaluations.committed()
    assert waiting(tmp_path) == [8]
    evaluations.collect()
    evaluations.committed()
    assert waiting(tmp_path) == []
    assert read_metrics(tmp_path)[-1] == (8, {"val/PQ": 0.5})


def test_a_restart_measures_what_has_no_figures_and_nothing_twice(opened, tmp_path, tiny_config):
    _, tracker = opened(0)
    folder = tmp_path / "evaluations"
    for step in (2, 4, 6):
        model = weights(tiny_config, step / 8)
        checkpoint.save_weights(folder / f"step-{step:08d}.safetensors", model, tiny_config)
    (folder / ".step-00000006.safetensors.partial").write_bytes(b"cut off")
    tracker.log(2, {"val/PQ": 99.0})  # measured before the cut, and not again
    tracker.log(6, {"train/loss": 1.0})

    evaluations, _ = opened(5)
    evaluations.resume(5)
    evaluations.collect()
    assert read_metrics(tmp_path) == [(2, {"val/PQ": 99.0}), (4, {"val/PQ": 0.5})]
    evaluations.committed()
    assert list(folder.iterdir()) == []


def test_a_run_that_begins_again_leaves_nothing_of_before(opened, tmp_path, tiny_config):
    evaluations, _ = opened(0)
    evaluations.submit(0, weights(tiny_config, 0.25))
    again, _ = opened(0)
    again.resume(0)
    assert waiting(tmp_path) == []


def test_what_an_evaluation_raises_is_raised_where_it_is_waited_for(opened, tiny_config, monkeypatch):
    def refuses(*_arguments) -> None:
        raise InputError("val/image-3.jpg: no image")

    monkeypatch.setattr(background, "_evaluate", refuses)
    evaluations, _ = opened(0)
    evaluations.submit(4, weights(tiny_config, 0.0))
    with pytest.raises(InputError, match=r"image-3\.jpg: no image"):
        evaluations.collect()
