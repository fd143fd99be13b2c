"""`predict` on files and folders: the JSON as pycocotools reads it, the PNG as COCO defines it."""

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import mpformer
from mpformer import draw
from mpformer.draw import decode_png
from mpformer.evaluate import file_results
from mpformer.evaluate.files import find_images, predict_files
from mpformer.types import InputError
from tests.evaluate.scenes import CLASSES, ColourModel, scenes, tiny_config


@pytest.fixture
def folder(tmp_path):
    """Two scenes of different sizes, one of them in a subfolder, and a file that is not an image."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    records = scenes(2).records
    (tmp_path / "in" / "one.png").write_bytes(records[0].image)
    (tmp_path / "in" / "deep" / "two.PNG").write_bytes(records[1].image)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    return tmp_path / "in"


def coco(path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_a_folder_gives_pictures_and_a_coco_file(folder, tmp_path, task):
    config = tiny_config(task)
    lines = []
    pictures = predict_files(ColourModel(), [folder], tmp_path / "out", config, report=lines.append)
    assert [str(p.relative_to(tmp_path / "out")) for p in pictures] == ["deep/two.png", "one.png"]
    assert all(decode_png(p.read_bytes()).ndim == 3 for p in pictures)
    assert len(lines) == 2

    file = coco(tmp_path / "out" / "predictions.json")
    assert [(i["width"], i["height"]) for i in file.dataset["images"]] == [(95, 75), (100, 72)]
    result = mpformer.segment(
        ColourModel(),
        folder / "one.png",
        task,
        resize=config.data.test_resize,
        options=config.evaluate,
    )
    annotations = file.loadAnns(file.getAnnIds(imgIds=[2]))
    assert sorted(a["category_id"] for a in annotations) == sorted(
        CLASSES.classes[s.label].source_id for s in result.segments
    )
    for a in annotations:
        same = [s for s in result.segments if CLASSES.classes[s.label].source_id == a["category_id"]]
        assert any((file.annToMask(a) == s.mask).all() for s in same)
        assert a["area"] == file.annToMask(a).sum()


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("least", [0.0, 0.5, 0.9, 1.0])
def test_what_is_drawn_is_what_is_counted_and_written(folder, tmp_path, monkeypatch, task, least):
    """One threshold for picture, count and JSON; with 1.0 nothing is left, and nothing is counted."""
    drawn, lines = [], []
    overlay = draw.overlay

    def counting(image, masks, *rest, **options):
        drawn.append(len(masks))
        return overlay(image, masks, *rest, **options)

    monkeypatch.setattr(draw, "overlay", counting)
    config = tiny_config(task)
    thresholds = {"score_threshold": least, "class_confidence": least}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=thresholds)})
    predict_files(ColourModel(), [folder], tmp_path / "out", config, report=lines.append)
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert all(one["score"] >= least for one in written)
    counts = [sum(one["image_id"] == image for one in written) for image in (1, 2)]
    assert counts == drawn
    assert [int(line.split(": ")[1].split()[0]) for line in lines] == counts
    assert (sum(counts) == 0) == (least == 1.0 or (task, least) == ("instance", 0.9))


def test_the_panoptic_png_and_json_describe_each_other(folder, tmp_path):
    predict_files(ColourModel(), [folder], tmp_path, tiny_config("panoptic"))
    data = json.loads((tmp_path / "panoptic.json").read_text())
    for annotation in data["annotations"]:
        b, g, r = np.moveaxis(cv2.imread(str(tmp_path / annotation["file_name"])).astype(int), 2, 0)
        ids = r + 256 * g + 65536 * b
        assert set(np.unique(ids)) - {0} == {s["id"] for s in annotation["segments_info"]}
        assert all((ids == s["id"]).sum() == s["area"] for s in annotation["segments_info"])
    assert {s["category_id"] for a in data["annotations"] for s in a["segments_info"]} >= {11, 12}


def test_the_label_png_holds_source_ids(folder, tmp_path):
    predict_files(ColourModel(), [folder / "one.png"], tmp_path, tiny_config("semantic"))
    labels = decode_png((tmp_path / "labels" / "one.png").read_bytes())
    assert labels.shape == (72, 100)
    assert set(np.unique(labels)) <= {3, 5, 11, 12}


def test_consecutive_images_of_one_size_form_a_batch(tmp_path):
    """Five images of sizes a, a, a, b, a in batches of two: a pair, one, one, one; and the same files."""
    records = scenes(13).records
    (tmp_path / "in").mkdir()
    for number, index in enumerate((0, 6, 12, 1, 0)):
        (tmp_path / "in" / f"{number}.png").write_bytes(records[index].image)
    config = tiny_config()
    together = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batch": 2})})
    model, sizes = ColourModel(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    predict_files(model, [tmp_path / "in"], tmp_path / "batches", together)
    assert sizes == [2, 1, 1, 1]
    predict_files(model, [tmp_path / "in"], tmp_path / "alone", config)
    assert sizes[4:] == [1] * 5
    for path in (tmp_path / "alone").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes()
                == (tmp_path / "batches" / path.relative_to(tmp_path / "alone")).read_bytes()
            )


def test_bad_paths_are_named_before_anything_is_written(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (("missing.png", "no such file"), ("empty", "no images")):
        with pytest.raises(InputError, match=message):
            predict_files(ColourModel(), [folder, tmp_path / path], tmp_path / "out", tiny_config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch", [1, 2])
def test_files_that_are_no_images_are_named_and_all_others_predicted(folder, tmp_path, batch):
    """Bad ones first, in between and last; in a folder, named themselves, and a link that leads nowhere."""
    image = scenes(1).records[0].image
    (folder / "a empty.jpg").write_bytes(b"")
    (folder / "f.png").write_bytes(image)
    (folder / "g cut.png").write_bytes(image[: len(image) // 2])
    (folder / "h\nlfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "i.png").symlink_to(tmp_path / "not there.png")
    (tmp_path / "last.jpg").write_text("<html>not found</html>")
    config = tiny_config("semantic")
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batch": batch})})
    lines, paths, out = [], [folder, tmp_path / "last.jpg"], tmp_path / "out"
    with pytest.raises(InputError) as error:
        predict_files(ColourModel(), paths, out, config, report=lines.append)
    expected = f"5 of 8 files could not be read: the first: {folder}/a empty.jpg: the file is empty"
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith(f"; the results of the others are in {out}")
    bad = [line for line in lines if line.startswith("left out: ")]
    names = ("a empty.jpg: ", "g cut.png: ", "h\\nlfs.png: ", "i.png: ", "last.jpg: ")
    assert (len(bad), len(lines)) == (5, 8)
    assert all(name in line and "\n" not in line for name, line in zip(names, bad))
    written = json.loads((out / "predictions.json").read_text())["images"]
    assert [i["file_name"] for i in written] == [
        f"{folder}/{n}" for n in ("deep/two.PNG", "f.png", "one.png")
    ]
    for name in ("deep/two", "f", "one"):
        assert (out / f"{name}.png").is_file()
        assert (out / "labels" / f"{name}.png").is_file()


def test_no_file_that_can_be_read_leaves_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"^1 of 1 files could not be read: .*a\.png: not an image") as error:
        predict_files(ColourModel(), [tmp_path / "a.png"], tmp_path / "out", tiny_config())
    assert "results" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_names_keep_images_apart(folder):
    (folder / "one.jpg").write_bytes(b"")
    assert [name for _, name in find_images([folder])] == ["deep/two", "one.jpg", "one.png"]
    with pytest.raises(InputError, match="overwrite"):
        find_images([folder, folder / "one.png"])


def test_what_macos_left_is_passed_over_with_a_count(folder):
    (folder / "._one.png").write_bytes(b"\0\5\x16\7")
    (folder / "__MACOSX" / "deep").mkdir(parents=True)
    (folder / "__MACOSX" / "deep" / "._two.PNG").write_bytes(b"\0\5\x16\7")
    lines = []
    assert [name for _, name in find_images([folder], lines.append)] == ["deep/two", "one"]
    assert lines == [f"{folder}: 2 files that a system left are passed over"]


def test_an_image_too_large_for_an_overlay_still_has_its_results(folder, tmp_path, monkeypatch, caplog):
    """Of 95x75 and 100x72 pixels the second is above a limit of 7150."""
    monkeypatch.setattr(file_results, "_LARGEST", 7150)
    pictures = predict_files(ColourModel(), [folder], tmp_path / "out", tiny_config("instance"))
    assert [p.name for p in pictures] == ["two.png"]
    assert [m.rsplit(": ", 2)[1:] for m in caplog.messages] == [
        ["left out", "100x72 pixels are too many for an overlay"]
    ]
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {a["image_id"] for a in found["annotations"]} == {1, 2}


def test_bits_in_use_reach_the_prediction(tmp_path):
    image = scenes(1).records[0]
    pixels = cv2.imdecode(np.frombuffer(image.image, np.uint8), cv2.IMREAD_COLOR)
    (tmp_path / "8.png").write_bytes(image.image)
    cv2.imwrite(str(tmp_path / "12.png"), pixels.astype(np.uint16) << 4)
    config = tiny_config("instance")
    deep = config.model_copy(update={"data": config.data.model_copy(update={"bits": 12})})
    found = []
    for name, settings in (("8", config), ("12", deep), ("12", config)):
        predict_files(ColourModel(), [tmp_path / f"{name}.png"], tmp_path / "out", settings)
        content = json.loads((tmp_path / "out" / "predictions.json").read_text())
        found.append([(a["category_id"], a["segmentation"]) for a in content["annotations"]])
    assert found[0] == found[1]
    assert found[0] != found[2]
