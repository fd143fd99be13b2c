"""Partial loading never counts as loading: wrappers, headless files, norms, settings that do not fit."""

import functools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpformer.cli.main import main
from mpformer.config import data as config_data
from mpformer.config.model import Pilot
from mpformer.model.architecture import build_model
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.loading import (
    export_huggingface,
    import_weights,
    load_checkpoint,
    load_weights,
)
from mpformer.model.weights.matching import part_of
from tests.model import weights_files as files
from tests.model.weights_files import refused

pytestmark = pytest.mark.slow

PREFIXES = [
    *("model.", "module.", "model.module.", "module.model.", "_orig_mod.", "module._orig_mod."),
    *("student.", "ema_model.", "ema_model.module.", "net."),
]
NESTINGS = [
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("ema",),
    ("model", "state_dict"),
    ("model_state", "module"),
]


def nest(tensors, keys):
    for key in reversed(keys):
        tensors = {key: tensors}
    return {**tensors, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}


# wrappers


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrapped_hugging_face_folder_is_the_model(prefix, model, copy, tmp_path):
    files.change_tensors(copy, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    report = import_weights(copy, tmp_path / "out.safetensors")
    assert report.reinitialized == ()
    assert files.same(load_file(tmp_path / "out.safetensors"), model.state_dict())
    # torch's own insertion is no wrapper of a program's and goes without a word
    shown = prefix.replace("_orig_mod.", "")
    assert (f"names begin with '{shown}'" in str(report)) == bool(shown)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nesting", [("model",), ("state_dict",)])
def test_a_wrapped_official_file_is_the_model(prefix, nesting, tmp_path):
    wrapped = {prefix + k: v for k, v in files.official().items()}
    torch.save(nest(wrapped, nesting), tmp_path / "a.pth")
    assert import_weights(tmp_path / "a.pth", tmp_path / "out.safetensors").reinitialized == ()
    again = load_file(tmp_path / "out.safetensors")
    assert files.same(again, files.small_model(files.small_config("resnet50")).state_dict())


@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_dictionaries_are_opened(nesting, model, copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(nest(tensors, nesting), copy / "pytorch_model.bin")
    assert import_weights(copy, tmp_path / "out.safetensors").reinitialized == ()
    assert files.same(load_file(tmp_path / "out.safetensors"), model.state_dict())


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_training_starts_from_wrapped_weights(prefix, suffix, model, tmp_path):
    file = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        files.save_ours(model, file, prefix)
    else:
        torch.save(nest({prefix + k: v for k, v in model.state_dict().items()}, ("state_dict",)), file)
    start = files.small_model(seed=1)
    assert load_weights(start, file).reinitialized == ()
    assert files.same(start.state_dict(), model.state_dict())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrapped_checkpoint_is_opened_and_exported(prefix, model, tmp_path):
    file = files.save_ours(model, tmp_path / "a.safetensors", prefix)
    again, _ = load_checkpoint(file)
    assert files.same(again.state_dict(), model.state_dict())
    export_huggingface(file, tmp_path / "hf")
    import_weights(tmp_path / "hf", tmp_path / "back.safetensors")
    assert files.same(load_file(tmp_path / "back.safetensors"), model.state_dict())


def test_torch_s_insertions_within_a_name_are_taken_out(model, tmp_path):
    """A part that is compiled, or checkpointed, alone."""
    inside = {re.sub(r"^(backbone|decoder)\.", r"\1._orig_mod.", k): v for k, v in model.state_dict().items()}
    torch.save(inside, tmp_path / "a.pth")
    start = files.small_model(seed=1)
    assert load_weights(start, tmp_path / "a.pth").reinitialized == ()
    assert files.same(start.state_dict(), model.state_dict())


@pytest.mark.parametrize("first", ["student.", "model."])
@pytest.mark.parametrize("second", ["teacher.", "ema_model."])
def test_of_two_copies_the_trained_one_is_taken_and_the_other_is_named(first, second, model, copy, tmp_path):
    other = files.small_model(seed=5)
    files.write_folder(tmp_path / "other", other)
    averaged = load_file(tmp_path / "other" / "model.safetensors")
    files.change_tensors(
        copy,
        lambda tensors: (
            {second + k: v for k, v in averaged.items()} | {first + k: v for k, v in tensors.items()}
        ),
    )
    report = import_weights(copy, tmp_path / "out.safetensors")
    assert f"not taken: the copy under '{second}'" in str(report)
    assert not any(name.startswith(second) for name in report.left_over)
    assert files.same(load_file(tmp_path / "out.safetensors"), model.state_dict())


def test_names_beside_the_wrapper_are_left_over_or_taken(model, copy, tmp_path):
    """A loss's buffers stand beside the wrapped model, and so may a head that was put on later."""

    def change(tensors):
        return {k if k.startswith("class_predictor") else f"model.{k}": v for k, v in tensors.items()} | {
            "metric.total": torch.zeros(1)
        }

    report = import_weights(files.change_tensors(copy, change), tmp_path / "out.safetensors")
    assert "metric.total" in report.left_over
    assert files.same(load_file(tmp_path / "out.safetensors"), model.state_dict())


def test_an_unknown_wrapper_is_named_not_guessed(model, copy, tmp_path):
    files.change_tensors(copy, lambda tensors: {f"segmenter.inner.{k}": v for k, v in tensors.items()})
    refused(
        lambda: import_weights(copy, tmp_path / "out.safetensors"),
        "its names begin with 'segmenter.inner.', which is no known wrapper (model, module, ",
    )
    file = files.save_ours(model, tmp_path / "a.safetensors", "segmenter.inner.")
    for call in (lambda: load_checkpoint(file), lambda: load_weights(files.small_model(), file)):
        refused(call, "'segmenter.inner.', which is no known wrapper")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_half_wrapped_file_is_refused(model, tmp_path):
    state = model.state_dict()
    mixed = {(f"module.{k}" if i % 2 else k): v for i, (k, v) in enumerate(state.items())}
    torch.save(mixed, tmp_path / "a.pth")
    start = files.small_model(seed=1)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    refused(
        lambda: load_weights(start, tmp_path / "a.pth"),
        "one model is expected in one place",
        "under 'module.'",
    )
    assert files.same(start.state_dict(), before)


# the minimum by part


def without(part):
    """Takes the tensors of one part of our model out of a state dict."""
    return lambda state: {k: v for k, v in state.items() if part_of(k) != part}


PARTS = ["backbone", "pixel decoder", "transformer decoder", "mask head", "class head"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_counted(part, model, tmp_path):
    torch.save(without(part)(model.state_dict()), tmp_path / "a.pth")
    start = files.small_model(seed=1)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    if part == "class head":
        report = load_weights(start, tmp_path / "a.pth")
        assert {part_of(name) for name in report.reinitialized} == {"class head"}
        assert not files.same(start.state_dict(), before)
    else:
        total = sum(part_of(k) == part for k in before)
        refused(
            lambda: load_weights(start, tmp_path / "a.pth"),
            f"too little of it fits the model's {part}",
            f"{part} 0 of {total}",
        )
        assert files.same(start.state_dict(), before)


@pytest.mark.parametrize("part", PARTS)
def test_an_import_has_every_part(part, folder, tmp_path):
    from mpformer.model.weights.names import huggingface_names, official_names

    ours = [k for k in files.small_model().state_dict() if part_of(k) == part]
    theirs = {n for k in ours for n in huggingface_names(k)}
    files.copy_of(folder, tmp_path / "hf")
    files.change_tensors(
        tmp_path / "hf", lambda tensors: {k: v for k, v in tensors.items() if k not in theirs}
    )
    line = refused(lambda: import_weights(tmp_path / "hf", tmp_path / "out.safetensors"))
    if part not in (
        "pixel decoder",
        "transformer decoder",
    ):  # whose layers are counted before the tensors are
        assert f"{part} 0 of {len(ours)}" in line
    state = files.small_model(files.small_config("resnet50")).state_dict()
    theirs = {official_names(k)[0] for k in state if part_of(k) == part}
    torch.save({"model": {k: v for k, v in files.official().items() if k not in theirs}}, tmp_path / "a.pth")
    refused(lambda: import_weights(tmp_path / "a.pth", tmp_path / "out.safetensors"), str(tmp_path / "a.pth"))
    assert not (tmp_path / "out.safetensors").exists()


def test_one_tensor_that_is_missing_is_named_with_the_nearest(copy, tmp_path):
    old, new = (
        "model.transformer_module.decoder.layernorm.weight",
        "model.transformer_module.decoder.layer_norm.weight",
    )
    files.change_tensors(copy, lambda tensors: {(new if k == old else k): v for k, v in tensors.items()})
    refused(
        lambda: import_weights(copy, tmp_path / "out.safetensors"),
        "backbone 100 of 100",
        f"'{old}' is missing, nearest there: '{new}'",
    )


def test_a_base_model_without_its_head_is_refused_with_the_counts(copy, tmp_path):
    """As `transformers` saves the inner model: names without their first word, no class head."""

    def change(tensors):
        return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}

    files.change_tensors(copy, change)
    for prefix in ("", "module."):
        files.change_tensors(copy, lambda tensors, p=prefix: {p + k: v for k, v in tensors.items()})
        refused(
            lambda: import_weights(copy, tmp_path / "out.safetensors"),
            "class head 0 of 2",
            "mask head 6 of 6",
            "'class_predictor.weight' is missing",
        )


def test_a_backbone_alone_is_refused_and_its_setting_named(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save(state, tmp_path / "a.pth")
    refused(lambda: load_weights(files.small_model(), tmp_path / "a.pth"), "model.backbone.pretrained")
    official = {k: v for k, v in files.official().items() if k.startswith("backbone.")}
    torch.save({"model": official}, tmp_path / "b.pth")
    refused(
        lambda: import_weights(tmp_path / "b.pth", tmp_path / "out.safetensors"),
        f"backbone {len(official)}, pixel decoder 0",
    )


def test_fine_tuning_may_change_queries_layers_and_classes(model, tmp_path):
    file = files.save_ours(model, tmp_path / "a.safetensors")
    start = files.small_model(files.small_config(queries=9, layers=3), ("a", "b"), seed=1)
    report = load_weights(start, file)
    assert {"decoder.query_feat.weight", "decoder.class_embed.weight"} <= set(report.reinitialized)
    assert torch.equal(start.decoder.mask_embed.layers[0].weight, model.decoder.mask_embed.layers[0].weight)


def test_a_mask2former_starts_an_mp_former(model, tmp_path):
    file = files.save_ours(model, tmp_path / "a.safetensors")
    config = files.small_config().model_copy(update={"pilot": Pilot(queries=10)})
    report = load_weights(files.small_model(config), file)
    assert report.reinitialized == ("decoder.pilot_embed.weight",)


@pytest.mark.parametrize("what", ["missing", "superfluous", "shape", "type", "nan"])
def test_a_checkpoint_is_whole(what, model, tmp_path):
    state, name = dict(model.state_dict()), "decoder.norm.weight"
    spoilt = {
        "missing": {},
        "superfluous": {name: state[name], "decoder.layers.2.linear1.weight": torch.zeros(32, 32)},
        "shape": {name: torch.zeros(33)},
        "type": {name: torch.zeros(32, dtype=torch.int8)},
        "nan": {name: torch.full((32,), float("nan"))},
    }[what]
    del state[name]
    file = files.save_ours(model, tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(state | spoilt, file, header)
    expected = {
        "missing": "'decoder.norm.weight' is missing",
        "superfluous": "superfluous: decoder.layers.*.linear1.weight",
        "shape": "'decoder.norm.weight' is [33] there, [32] is expected",
        "type": "'decoder.norm.weight' is int8 there, a float is expected",
        "nan": "'decoder.norm.weight' holds NaN",
    }[what]
    refused(lambda: load_checkpoint(file), str(file), expected)


# norms


def test_norms_in_and_out(tmp_path):
    """What each norm's checkpoint becomes at Hugging Face, and what comes back, bit by bit."""
    for norm in ("frozen_bn", "bn"):
        model = files.small_model(files.small_config(norm=norm))
        file = files.save_ours(model, tmp_path / f"{norm}.safetensors")
        export_huggingface(file, tmp_path / norm)
        written = load_file(tmp_path / norm / "model.safetensors")
        counters = [v.item() for k, v in written.items() if k.endswith("num_batches_tracked")]
        assert counters == [17 if norm == "bn" else 0] * 20
        report = import_weights(tmp_path / norm, tmp_path / "back.safetensors")
        assert report.reinitialized == ()
        back, config = load_checkpoint(tmp_path / "back.safetensors")
        assert config.model.backbone.norm == "frozen_bn"
        wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert files.same(back.state_dict(), wanted)
        # and out again: the same file but for the counters
        export_huggingface(tmp_path / "back.safetensors", tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert files.same(
            {k: v for k, v in again.items() if "tracked" not in k},
            {k: v for k, v in written.items() if "tracked" not in k},
        )


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "group_norm"])
def test_exports_come_back_bit_equal(backbone, norm, tmp_path):
    model = files.small_model(files.small_config(backbone, norm))
    file = files.save_ours(model, tmp_path / "a.safetensors")
    export_huggingface(file, tmp_path / "hf")
    import_weights(tmp_path / "hf", tmp_path / "back.safetensors")
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert files.same(load_file(tmp_path / "back.safetensors"), wanted)


def test_live_and_frozen_statistics_start_each_other(tmp_path):
    models = {norm: files.small_model(files.small_config(norm=norm)) for norm in ("frozen_bn", "bn")}
    for theirs, other in (("frozen_bn", "bn"), ("bn", "frozen_bn")):
        file = files.save_ours(models[theirs], tmp_path / f"{theirs}.safetensors")
        start = files.small_model(files.small_config(norm=other), seed=1)
        report = load_weights(start, file)
        assert all(name.endswith("num_batches_tracked") for name in report.reinitialized + report.left_over)
        for name, tensor in models[theirs].state_dict().items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(start.state_dict()[name], tensor), name


@pytest.mark.parametrize("batch_norm", ["frozen_bn", "bn"])
def test_group_norm_is_not_started_from_batch_norm_nor_the_other_way(batch_norm, tmp_path):
    """Their scales and shifts have the same names and shapes, and mean different things."""
    configs = [files.small_config(norm=norm) for norm in (batch_norm, "group_norm")]
    for theirs, ours in (configs, reversed(configs)):
        file = files.save_ours(files.small_model(theirs), tmp_path / "a.safetensors")
        start = functools.partial(load_weights, files.small_model(ours), file)
        refused(start, "running statistics", "model.backbone.norm=")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backbone": {"output_norms": True}}, "backbone.output_norms is True"),
        ({"pixel_decoder": {"kind": "fpn"}}, "pixel_decoder.kind is fpn"),
        ({"pixel_decoder": {"last_kernel": 3}}, "pixel_decoder.last_kernel is 3"),
        ({"pixel_decoder": {"heads": 4}}, "equal heads in both decoders"),
        ({"pixel_decoder": {"points": 2}}, "4 points"),
        ({"decoder": {"attention": "smca"}}, "decoder.attention is smca"),
        ({"decoder": {"encoder_layers": 1}}, "decoder.encoder_layers is 1"),
        ({"decoder": {"self_attention": False}}, "decoder.self_attention is False"),
        ({"loss": {"assignment": "fixed"}}, "loss.assignment is fixed"),
        ({"loss": {"match_by": "boxes"}}, "loss.match_by is boxes"),
        ({"output": "per_pixel"}, "output is per_pixel"),
    ],
)
def test_what_the_hugging_face_form_cannot_hold_is_said_and_nothing_written(settings, reason, tmp_path):
    plain = files.small_config().model_dump(mode="json")
    for section, values in settings.items():
        plain[section] = plain[section] | values if isinstance(values, dict) else values
    model = build_model(type(files.small_config()).model_validate(plain), 3)
    refused(
        lambda: write_huggingface(model, tmp_path / "hf", config_data.TestResize()),
        "cannot hold this model",
        reason,
    )
    assert not (tmp_path / "hf").exists()


# the commands


def test_the_commands_leave_with_2_and_one_line(checkpoint, copy, tmp_path, capsys):
    files.change_tensors(copy, lambda tensors: {f"odd.{k}": v for k, v in tensors.items()})
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n")
    pointer, out = str(tmp_path / "pointer.safetensors"), str(tmp_path / "out.safetensors")
    for arguments in (
        ["weights", "import", str(copy), out],
        ["weights", "import", pointer, out],
        ["weights", "import", str(checkpoint), out],
        ["weights", "export", pointer, out],
        ["weights", "export", str(copy), out],
        ["evaluate", pointer],
        ["diagnose", pointer],
        ["predict", pointer, str(tmp_path), "--out", out],
        ["predict", str(copy), str(tmp_path), "--out", out],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1, arguments
        assert arguments[-1] in said.err or arguments[-2] in said.err or arguments[1] in said.err
        assert not (tmp_path / "out.safetensors").exists()


def test_an_import_leaves_an_older_file_alone_where_it_fails(copy, tmp_path):
    out = tmp_path / "out.safetensors"
    import_weights(copy, out)
    before = out.read_bytes()
    files.change_tensors(copy, lambda tensors: dict(list(tensors.items())[:50]))
    refused(lambda: import_weights(copy, out))
    assert out.read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


def test_a_foreign_place_is_told_what_reads_it(copy, tmp_path):
    refused(lambda: load_weights(files.small_model(), copy), "`mpformer weights import SRC OUT.safetensors`")
    refused(lambda: load_checkpoint(copy), "`mpformer weights import SRC OUT.safetensors`")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    refused(lambda: load_checkpoint(copy), "it is a Hugging Face folder")
    torch.save({"model": files.official()}, tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), "weights import")
    refused(lambda: load_weights(files.small_model(), tmp_path / "a.pth"), "weights import")
    refused(lambda: load_checkpoint(tmp_path / "aa.pth"), f"nearest: {tmp_path / 'a.pth'}")
