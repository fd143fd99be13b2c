"""`mpformer.load` and `mpformer.segment`: a run that is opened, images that it segments as it was tested."""

import io
import json
import pydoc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mpformer
from mpformer.config import Evaluate
from mpformer.config import data as settings
from mpformer.data.catalog import open_split
from mpformer.evaluate.inference import predict_records, to_result
from mpformer.types import InputError

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebooks/open-a-run.ipynb"


@pytest.fixture(scope="module")
def model(finished_run):
    return mpformer.load(finished_run.folder)


@pytest.fixture(scope="module")
def image(finished_run):
    return sorted((finished_run.scenes / "val2017").iterdir())[0]


def same(a, b) -> bool:
    return [(s.label, s.score) for s in a.segments] == [(s.label, s.score) for s in b.segments] and all(
        (x.mask == y.mask).all() for x, y in zip(a.segments, b.segments)
    )


def test_a_run_a_checkpoint_and_a_file_open_the_same_model(finished_run, model):
    checkpoint = finished_run.folder / "checkpoints" / "step-00000020"
    for place in (str(finished_run.folder), checkpoint, checkpoint / "model.safetensors"):
        again = mpformer.load(place)
        assert not again.training
        assert again.classes == open_split(finished_run.config.data, "val").classes
        own = finished_run.model.config  # with the normalisation of its images
        assert again.settings == finished_run.config.model_copy(update={"model": own})
        own = finished_run.model.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in again.state_dict().items())
    assert model.settings.data.test_resize == settings.TestResize(short=64, long=64)


def test_an_image_is_segmented_as_the_run_was_tested(finished_run, model):
    """By the path of evaluation, with the run's own task, size and thresholds."""
    split = open_split(finished_run.config.data, "val")
    [expected] = predict_records(model, split, finished_run.config, [0])
    found = mpformer.segment(model, split.records[0].image)
    assert found.task == finished_run.config.data.task == "panoptic"
    assert found.segments
    assert same(found, to_result(expected, model.classes))
    other = mpformer.segment(model, split.records[0].image, resize=settings.TestResize(short=128, long=128))
    assert not same(found, other)
    assert not mpformer.segment(
        model, split.records[0].image, options=Evaluate(class_confidence=1.0)
    ).segments


def test_a_path_an_array_and_a_picture_give_the_same(model, image):
    expected = mpformer.segment(model, str(image))
    picture = Image.open(image)
    array = np.array(picture.convert("RGB"))
    assert expected.size == array.shape[:2]
    for form in (image, array, picture, picture.convert("RGBA")):
        assert same(mpformer.segment(model, form), expected)


def test_pictures_of_any_mode_are_as_their_files(model, tmp_path):
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (40, 60), np.uint8)
    deep = (grey.astype(np.uint16) << 8) + 7
    turned = Image.fromarray(np.stack([grey] * 3, axis=2))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    for name, picture, options in (
        ("grey.png", Image.fromarray(grey), {}),
        ("palette.png", Image.fromarray(grey).convert("P"), {}),
        ("deep.png", Image.fromarray(deep), {}),
        ("turned.png", turned, {"exif": exif.tobytes()}),
    ):
        picture.save(tmp_path / name, **options)
        expected = mpformer.segment(model, tmp_path / name)
        assert same(mpformer.segment(model, Image.open(tmp_path / name)), expected), name
    assert expected.size == (60, 40)


def test_what_is_no_image_is_one_line(model, image):
    cut = Image.open(io.BytesIO(image.read_bytes()[: image.stat().st_size // 2]))
    wrong = (
        [[1, 2], [3, 4]],
        None,
        torch.zeros(3, 8, 8),
        Image.fromarray(np.zeros((4, 4), np.float32)),
        np.zeros((4, 4, 3)),
        cut,
        "nowhere.jpg",
    )
    for one in wrong:
        with pytest.raises(InputError) as caught:
            mpformer.segment(model, one)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="an array, a PIL image or a path is expected, not Tensor"):
        mpformer.segment(model, torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("trained", "task", "expected"),
    [
        (
            "panoptic",
            "instnace",
            "task: 'instnace' is none of instance, panoptic, semantic; nearest: instance",
        ),
        ("instance", "semantic", "trained for the task instance: instance or panoptic is expected"),
        ("semantic", "panoptic", "trained for the task semantic: semantic is expected"),
        ("panoptic", "semantic", None),
        ("instance", None, None),
    ],
)
def test_the_task_is_checked(finished_run, image, trained, task, expected):
    model = mpformer.load(finished_run.folder)
    data = model.settings.data.model_copy(update={"task": trained})
    model.settings = model.settings.model_copy(update={"data": data})
    if expected is None:
        assert mpformer.segment(model, image, task).task == (task or trained)
        return
    with pytest.raises(InputError) as caught:
        mpformer.segment(model, image, task)
    assert expected in str(caught.value)


def test_a_model_that_was_built_needs_no_run(finished_run, image):
    built = mpformer.build_model(finished_run.config.model.without_pretrained(), 3).eval()
    assert built.settings is None
    resize = settings.TestResize(short=64, long=64)
    assert mpformer.segment(built, image, resize=resize).task == "panoptic"


def test_help_tells_how_they_are_called():
    whole = pydoc.plain(pydoc.render_doc(mpformer))
    for name in ("load", "segment", "load_weights", "build_model", "load_config"):
        assert f"    {name}(" in whole
    load, segment = (pydoc.plain(pydoc.render_doc(f)) for f in (mpformer.load, mpformer.segment))
    for word in (
        "mpformer weights list",
        "hf:OWNER/NAME[@REVISION]",
        "classes",
        "test_resize",
        ">>>",
        "InputError",
    ):
        assert word in load
    for word in ("[h,w,3] uint8", "PIL image", "path", "panoptic", "test size", ">>>", "InputError"):
        assert word in segment


def test_the_notebook_runs_from_top_to_bottom(finished_run, image, monkeypatch, tmp_path):
    """Its cells in this process, on a run and an image in the places that it names."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my-run").symlink_to(finished_run.folder)
    (tmp_path / "image.jpg").write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert names["result"].segments
    assert np.asarray(names["picture"]).shape[2] == 3
    assert names["fine_tuned"].classes.names == ("scratch", "dent")
    assert any("class head is left as it was" in note for note in names["report"].notes)
