"""`mpformer export` on a run, and what a file of it is used for elsewhere."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import mpformer
from mpformer.cli.export import _choices, _pictures
from mpformer.cli.main import main
from mpformer.config import data as config_data
from mpformer.data.catalog import open_split
from mpformer.data.images import load_image
from mpformer.model.weights import loading, named
from mpformer.types import ClassTable

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install -e .[export]"
)
EXAMPLE = Path(__file__).parents[2] / "docs/examples/run_onnx.py"


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert main(["export", str(finished_run.folder), str(out), "batch=any"]) == 0
    return out


def test_the_file_says_what_it_is(exported, finished_run):
    session = onnxruntime.InferenceSession(exported)
    notes = session.get_modelmeta().custom_metadata_map
    assert ClassTable.from_dict(json.loads(notes["classes"])) == finished_run.model.classes
    assert notes["task"] == "panoptic"
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64], "the recipe's crop"
    assert [one.name for one in session.get_outputs()] == ["class_logits", "mask_logits"]


def test_the_example_finds_what_segment_finds(exported, finished_run):
    spec = importlib.util.spec_from_file_location("run_onnx", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    record = open_split(finished_run.config.data, "val").records[0]
    image = load_image(record)
    found = example.find_instances(onnxruntime.InferenceSession(exported), image, least_score=0.1)
    options = finished_run.config.evaluate.model_copy(update={"score_threshold": 0.1})
    wanted = mpformer.segment(
        finished_run.model.eval(),
        image,
        "instance",
        resize=config_data.TestResize(short=64, long=64),
        options=options,
    )
    assert len(found) > 1
    assert [name for name, *_ in found] == [one.name for one in wanted.segments]
    for (_, score, mask), one in zip(found, wanted.segments):
        assert score == pytest.approx(one.score, abs=1e-3)
        assert np.mean(mask != one.mask) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.pt"], "out.pt: the name of a file that ends in .onnx is expected"),
        (
            ["out.onnx", "size=100"],
            "setting 'size=100': HEIGHTxWIDTH in multiples of 32, up to 8192, is expected",
        ),
        (
            ["out.onnx", "size=64x8224"],
            "'size=64x8224': HEIGHTxWIDTH in multiples of 32, up to 8192, is expected",
        ),
        (["out.onnx", f"size={'3' * 5000}2"], "HEIGHTxWIDTH in multiples of 32, up to 8192, is expected"),
        (["out.onnx", "batch=0"], "setting 'batch=0': a number of images, 1 to 256, or any, is expected"),
        (["out.onnx", "batch=257"], "a number of images, 1 to 256, or any, is expected"),
        (["out.onnx", f"batch={'9' * 5000}"], "a number of images, 1 to 256, or any, is expected"),
        (["out.onnx", "image=nowhere.jpg"], "setting 'image=nowhere.jpg': there is no such file"),
        (["out.onnx", "input=int8"], "setting 'input=int8': uint8 or float32 is expected"),
        (["out.onnx", "sise=64"], "setting 'sise=64': no such setting here; nearest: size"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(loading, "load_checkpoint", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(named, "check_reachable", lambda *_: pytest.fail("looked for"))
    assert main(["export", "hf:owner/name", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path(arguments[0]).exists()


def test_without_its_data_it_is_compared_on_generated_images(finished_run):
    config = finished_run.config
    chosen = _choices(["size=64x96", "batch=any"])
    assert (chosen.size, chosen.batch) == ((64, 96), None)
    own, source = _pictures(chosen, config, (64, 96))
    assert (len(own), source.startswith("2 images of ")) == (2, True)
    away = config.model_copy(update={"data": config.data.model_copy(update={"root": "/nowhere"})})
    generated, source = _pictures(chosen, away, (64, 96))
    assert (len(generated), source) == (2, "generated images")
    assert not np.array_equal(*generated)
