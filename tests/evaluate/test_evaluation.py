"""An evaluation: its times and page, and equal results with Ray workers."""

from dataclasses import replace

import pytest

from mpformer.evaluate.evaluation import evaluate
from mpformer.evaluate.pages import write_page
from mpformer.types import InputError
from tests.evaluate.scenes import ColourModel, scenes, tiny_config, tiny_model


def test_an_evaluation_reports_its_progress_stages_and_memory(tmp_path):
    config, catalog = tiny_config(), scenes(3)
    calls = []
    found, usage = evaluate(tiny_model(config), catalog, config, report=lambda *a: calls.append(a))
    assert [(done, of) for done, of, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    assert calls[-1][2] == 0
    assert {"predict", "metrics", "forward", "results", "layers"} == set(usage.seconds)
    assert sum(usage.seconds[k] for k in ("forward", "results", "layers")) <= usage.seconds["predict"]
    assert usage.peak_memory > 50e6
    assert {f"{n}_{i}" for n in ("layer_iou", "query_utilization") for i in (1, 2, 3)} == set(found.layers)
    values = found.values()
    assert values["val/PQ"] == found.scores.summary["PQ"]
    assert values["diag/layer_iou_1"] == found.layers["layer_iou_1"]
    page = write_page(tmp_path, "title", found, count=2, facts=usage.facts())[0].read_text()
    assert "images per second" in page


def test_the_limit_takes_the_first_images():
    config = tiny_config("semantic")
    limited = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"limit": 2})})
    found, _ = evaluate(ColourModel(), scenes(4), limited)
    assert [p.image_id for p in found.predictions] == ["scene-0", "scene-1"]


@pytest.mark.slow
def test_one_and_three_ray_workers_give_bit_equal_results():
    """Eleven images, so the shares are uneven; the error of a task is raised with its own type."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        config, catalog = tiny_config(), scenes(11)
        cluster = config.cluster.model_copy(update={"workers": 3, "threads": 1})
        shared = config.model_copy(update={"cluster": cluster})
        alone, _ = evaluate(ColourModel(), catalog, config)
        together, _ = evaluate(ColourModel(), catalog, shared)
        assert sorted(together.predictions, key=lambda p: p.image_id) == sorted(
            alone.predictions, key=lambda p: p.image_id
        )
        assert together.scores == alone.scores
        assert 10 < alone.scores.summary["PQ"] < 100

        broken = replace(catalog.records[7], image=b"no image")
        records = [*catalog.records[:7], broken, *catalog.records[8:]]
        with pytest.raises(InputError, match="scene-7"):
            evaluate(ColourModel(), replace(catalog, records=records), shared)
    finally:
        ray.shutdown()
