"""Hugging Face folders whose labels, settings or tensors do not fit: one line that names what."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from mpformer.config import data
from mpformer.model.architecture import build_model
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.loading import (
    import_weights,
    load_checkpoint,
    read_metadata,
)
from tests.model import weights_files as files
from tests.model.weights_files import refused

pytestmark = pytest.mark.slow


# labels and settings


def reverse(labels):
    return {name: int(id) for id, name in labels.items()}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            reverse,
            "id2label: 'cat' is no id: whole numbers are expected as keys, such as \"0\": these are names",
        ),
        (lambda _: {"cat": "cat", "dog": "dog", "bird": "bird"}, "'cat' is no id"),
        (lambda _: {"0": "cat", "1": "dog"}, "names 2 classes, its class head has 3"),
        (lambda _: {str(i): f"c{i}" for i in range(9)}, "names 9 classes, its class head has 3"),
        (lambda _: {"1": "cat", "2": "dog", "3": "bird"}, "have the ids 0 to 2; 0 is missing"),
        (lambda _: {"0": "cat", "1": "dog", "7": "bird"}, "2 is missing"),
        (lambda _: {"0": "cat", "1": "dog", "2.0": "bird"}, "'2.0' is no id"),
        (lambda _: {"0": "cat", "1": "dog", "-1": "bird"}, "'-1' is no id"),
        (lambda _: {"0": "cat", "1": 5, "2": "bird"}, "1: a name is expected, not 5"),
        (lambda _: {"0": "cat", "1": None, "2": "bird"}, "1: a name is expected, not None"),
        (lambda _: ["cat", "dog", "bird"], "id2label: an object such as"),
        (lambda _: "cat", "id2label: an object such as"),
    ],
)
def test_labels_that_are_no_table_of_ids_are_one_line(labels, expected, copy, tmp_path):
    files.change_settings(copy, lambda s: s.update(id2label=labels(s["id2label"])))
    refused(lambda: import_weights(copy, tmp_path / "out.safetensors"), "config.json", expected)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("labels", [None, {}, "absent"])
def test_without_labels_classes_are_numbered_and_it_is_said(labels, copy, tmp_path):
    def change(settings):
        settings.update(id2label=labels)
        if labels == "absent":
            del settings["id2label"]

    report = import_weights(files.change_settings(copy, change), tmp_path / "out.safetensors")
    assert "the file names no classes: they are numbered 0 to 2" in str(report)
    assert load_checkpoint(tmp_path / "out.safetensors")[0].classes.names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("encoder_layers", 6, "encoder_layers is 6, the weights have 1 such layers"),
        ("decoder_layers", 2, "decoder_layers is 2, the weights have 2 layers, for which 3 is expected"),
        ("decoder_layers", 10**9, "decoder_layers: a whole number in 0..65536"),
        ("decoder_layers", 0, "decoder_layers is 0, the weights have 2"),
        ("num_queries", 100, "is [5, 32] there, [100, 32] is expected"),
        ("num_queries", 0, "queries"),
        ("feature_size", 64, "[3, 64] is expected"),
        ("feature_size", "wide", "feature_size: a whole number in 0..65536 is expected (given: 'wide')"),
        ("feature_size", -1, "feature_size: a whole number"),
        ("feature_size", 1.5, "feature_size: a whole number"),
        ("feature_size", True, "feature_size: a whole number"),
        ("encoder_feedforward_dim", 2048, "is [32, 32] there, [2048, 32] is expected"),
        ("num_attention_heads", 7, "32 channels do not divide by 7"),
        ("dropout", 2.0, "dropout"),
        ("dropout", None, "dropout: a number is expected"),
        ("class_weight", "2", "class_weight: a number is expected (given: '2')"),
        ("pre_norm", True, "pre_norm: False, the only kind that is supported, is expected (given: True)"),
        ("activation_function", "gelu", "activation_function: 'relu'"),
        ("feature_strides", [4, 8], "feature_strides: [4, 8, 16, 32]"),
        ("backbone_config", None, "backbone_config: an object with settings is expected"),
        (
            "backbone_config",
            {"model_type": "swin", "depths": [2, 2, 6, 2]},
            "backbone_config.embed_dim' is missing",
        ),
        ("backbone_config", {"model_type": "resnet", "depths": [[3], 4]}, "depths: a list of whole numbers"),
        ("backbone_config", {"model_type": "convnext"}, "backbone convnext [] is none of resnet18"),
        ("backbone_config.downsample_in_bottleneck", True, "downsample_in_bottleneck: False"),
        ("backbone_config.depths", [3, 4, 6, 3], "backbone 100 of 180"),
        ("model_type", "detr", "'mask2former' or 'maskformer' is expected, not 'detr'"),
        ("model_type", ["mask2former"], "is expected, not ['mask2former']"),
        ("model_type", "maskformer", "decoder_config' is missing"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_one_line(key, value, expected, copy, tmp_path):
    def change(settings):
        *sections, last = key.split(".")
        for section in sections:
            settings = settings[section]
        settings[last] = value

    files.change_settings(copy, change)
    refused(lambda: import_weights(copy, tmp_path / "out.safetensors"), str(copy), expected)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_setting_that_is_missing_is_named_with_the_nearest(copy, tmp_path):
    files.change_settings(copy, lambda s: s.update(num_querries=s.pop("num_queries")))
    refused(
        lambda: import_weights(copy, tmp_path / "out.safetensors"),
        "the setting 'num_queries' is missing; nearest: num_querries",
    )


QUERY_BIAS = "model.transformer_module.decoder.layers.0.self_attn.q_proj.bias"


def with_head(change):
    """Changes the class head's weight alone."""
    name = "class_predictor.weight"
    return lambda tensors: tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_head(lambda t: t.half()), None),
        (lambda t: {k: v.bfloat16() if v.is_floating_point() else v for k, v in t.items()}, None),
        (with_head(lambda t: t.to(torch.int8)), "is int8 there"),
        (with_head(lambda t: t * torch.inf), "NaN or infinite"),
        (lambda t: t | {"class_predictor.bias": torch.zeros(1)}, "its class head has 1 rows"),
        (lambda t: t | {"class_predictor.bias": torch.zeros(())}, "'class_predictor.bias' is [] there"),
        (lambda t: t | {QUERY_BIAS: torch.zeros(())}, "[[], [32], [32]] there"),
        (
            lambda t: {k: v for k, v in t.items() if ".decoder.layers.0." not in k},
            "decoder.layers.0.* are missing, though there are later ones",
        ),
        (
            lambda t: t | {k.replace("stages.0.layers.1", "stages.0.layers.2"): v for k, v in t.items()},
            "has more than the model that it describes",
        ),
    ],
)
def test_tensors_of_odd_kinds(change, expected, copy, tmp_path):
    files.change_tensors(copy, change)
    if expected is None:
        assert import_weights(copy, tmp_path / "out.safetensors").reinitialized == ()
        assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {torch.float32}
    else:
        refused(lambda: import_weights(copy, tmp_path / "out.safetensors"), expected)


# --- the size at which a folder says that it is tested ------------------------------------------------


@pytest.mark.parametrize(
    "resize",
    [
        data.TestResize(short=64, long=96),
        data.TestResize(short=64, long=None),
        data.TestResize(short=None, long=96),
        data.TestResize(short=None, long=None),
    ],
    ids=str,
)
def test_the_test_size_survives_export_and_import(resize, tmp_path):
    write_huggingface(files.cached_model(), tmp_path / "hf", resize)
    import_weights(tmp_path / "hf", tmp_path / "back.safetensors")
    assert read_metadata(tmp_path / "back.safetensors")[0].data.test_resize == resize


@pytest.mark.parametrize(
    ("told", "expected", "note"),
    [
        ({"size": 480, "max_size": 640}, (480, 640), None),  # of early versions
        ({"size": {"shortest_edge": 480}}, (480, None), None),
        ({}, (800, 1333), None),
        ({"size": {"height": 384, "width": 384}}, (800, 1333), "changes the aspect"),
        ({"size": {"shortest_edge": "480"}}, None, "sides in pixels"),
        ({"size": {"shortest_edge": True}}, None, "sides in pixels"),
        (
            {"size": {"shortest_edge": 16385}},
            None,
            "sides in pixels, the shorter one up to 16384, is expected",
        ),
        ({"size": 10**9}, None, "sides in pixels, the shorter one up to 16384, is expected"),
    ],
)
def test_test_sizes_of_other_folders(copy, tmp_path, told, expected, note):
    (copy / "preprocessor_config.json").write_text(json.dumps(told))
    if expected is None:
        files.refused(
            lambda: import_weights(copy, tmp_path / "a.safetensors"), note, "preprocessor_config.json"
        )
        return
    report = import_weights(copy, tmp_path / "a.safetensors")
    found = read_metadata(tmp_path / "a.safetensors")[0].data.test_resize
    assert (found.short, found.long) == expected
    assert [note in line for line in report.notes] == ([True] if note else [])


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, IMAGENET),
        ({}, IMAGENET),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, ((127.5,) * 3, (127.5,) * 3)),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, ((63.75,) * 3,) * 2),
        (
            {"image_mean": [127.0] * 3, "image_std": [128] * 3, "do_rescale": False},
            ((127.0,) * 3, (128.0,) * 3),
        ),
        ({"do_normalize": False}, ((0.0,) * 3, (255.0,) * 3)),
        ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, "image_std"),
        ({"image_mean": [0.5] * 2, "image_std": [0.5] * 2}, "image_mean"),
        ({"image_mean": 0.5, "image_std": [0.5] * 3}, "image_mean"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0}, "rescale_factor"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": math.nan}, "rescale_factor"),
        ({"image_mean": [10**400] * 3, "image_std": [0.5] * 3}, "image_mean"),
        ({"image_mean": [0.5] * 3, "image_std": [math.inf] * 3}, "image_std"),
    ],
)
def test_images_of_other_folders_are_normalised_as_they_say(copy, tmp_path, told, expected):
    (copy / "preprocessor_config.json").write_text(json.dumps(told))
    if isinstance(expected, str):
        files.refused(lambda: import_weights(copy, tmp_path / "a.safetensors"), expected)
        return
    import_weights(copy, tmp_path / "a.safetensors")
    model, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert (model.config.backbone.mean, model.config.backbone.std) == expected


def test_the_normalisation_survives_export_and_import(tmp_path):
    model = files.cached_model()
    own = build_model(model.config.with_backbone(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.5)), model.classes)
    write_huggingface(own, tmp_path / "hf", data.TestResize())
    import_weights(tmp_path / "hf", tmp_path / "back.safetensors")
    again, _ = load_checkpoint(tmp_path / "back.safetensors")
    assert again.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert again.pixel_std.flatten().tolist() == [4.0, 5.0, 6.5]
