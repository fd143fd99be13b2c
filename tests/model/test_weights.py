"""Official files in: containers, names, the model inferred from them; partial loading, reported."""

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpformer.config import Config
from mpformer.config.model import Backbone, Decoder, Model, Pilot, PixelDecoder
from mpformer.model.architecture import build_model
from mpformer.model.weights.loading import (
    checkpoint_metadata,
    import_weights,
    load_checkpoint,
    load_weights,
    read_metadata,
)
from mpformer.model.weights.names import official_names
from mpformer.types import ClassInfo, ClassTable, InputError
from tests.model.hugging_face import SMALL, random_mask2former, to_ours

pytestmark = pytest.mark.slow

SWIN_LARGE = Backbone(name="swin_large_patch4_window12_384", pretrained=None)


def layout(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of an official checkpoint, as they were written down from one."""
    folder = Path(
        os.environ.get("MPFORMER_WEIGHTS_KEYS", Path(__file__).parents[3] / "shared" / "weights-keys")
    )
    file = folder / f"keys_{name}.txt"
    if not file.is_file():
        pytest.skip(f"no {file.name} at {folder}: set MPFORMER_WEIGHTS_KEYS to the folder that holds it")
    rows = (line.split("\t") for line in file.read_text().splitlines() if line)
    return {name: (tuple(int(n) for n in re.findall(r"\d+", shape)), dtype) for name, shape, dtype in rows}


@pytest.mark.parametrize("flavour", ["mask2former", "mpformer"])
@pytest.mark.parametrize(
    ("backbone", "queries"),
    [("r50", 100), pytest.param("swinl", 200, marks=pytest.mark.slow)],
)
def test_every_tensor_of_the_official_layout_has_its_place(flavour, backbone, queries):
    """Names and shapes on both sides, without memory for the weights."""
    official = layout(f"{flavour}_{backbone}")
    pilot = Pilot(queries=0) if flavour == "mask2former" else Pilot(flavour="released")
    config = Model(
        backbone=Backbone(pretrained=None) if backbone == "r50" else SWIN_LARGE,
        decoder=Decoder(queries=queries),
        pilot=pilot,
    )
    with torch.device("meta"):
        own = build_model(config, 80).state_dict()
    translated = {name: official_names(name) for name in own}
    assert {n for names in translated.values() for n in names} | {
        n for n in official if n.endswith("relative_position_index")
    } == set(official) - {"criterion.empty_weight"}
    for name, (theirs,) in translated.items():
        assert tuple(own[name].shape) == official[theirs][0], name


def random_official(name: str) -> "OrderedDict[str, torch.Tensor]":
    random = torch.Generator().manual_seed(0)
    result = OrderedDict()
    for key, (shape, dtype) in layout(name).items():
        integers = torch.zeros(shape, dtype=torch.int64)
        result[key] = integers if dtype == "int64" else torch.randn(shape, generator=random) * 0.02
    return result


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("mask2former_r50", ".pkl"),
        pytest.param("mask2former_r50", ".pth", marks=pytest.mark.slow),
        pytest.param("mpformer_r50", ".pth", marks=pytest.mark.slow),
    ],
)
def test_official_containers(name, suffix, tmp_path):
    tensors = random_official(name)
    file = tmp_path / f"model_final{suffix}"
    if suffix == ".pkl":
        arrays = {k: v.numpy() for k, v in tensors.items()}
        content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
        file.write_bytes(pickle.dumps(content))
    else:
        optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        torch.save({"model": tensors, "optimizer": optimizer, "iteration": 367500}, file)
    report = import_weights(file, tmp_path / "out.safetensors")
    assert report.reinitialized == ()
    assert report.left_over == ("criterion.empty_weight",)
    config, classes = read_metadata(tmp_path / "out.safetensors")
    piloted = name.startswith("mpformer")
    assert len(classes) == 80
    assert config.model == Model(
        backbone=Backbone(name="resnet50", pretrained=None),
        pilot=Pilot(
            queries=100 if piloted else 0,
            flavour="released" if piloted else "paper",
            query_positions=not piloted,
        ),
    )
    model, _ = load_checkpoint(tmp_path / "out.safetensors")
    for own, tensor in model.state_dict().items():
        (theirs,) = official_names(own)
        assert torch.equal(tensor, tensors[theirs]), own


def to_official(name: str) -> str:
    """An official name from one of Hugging Face's, by a table found by comparing the two programs."""
    rules = [
        ("model.pixel_level_module.encoder.embedder.embedder.convolution", "backbone.stem.conv1"),
        ("model.pixel_level_module.encoder.embedder.embedder.normalization", "backbone.stem.conv1.norm"),
        (
            "model.pixel_level_module.decoder.level_embed",
            "sem_seg_head.pixel_decoder.transformer.level_embed",
        ),
        (
            "model.pixel_level_module.decoder.encoder.layers",
            "sem_seg_head.pixel_decoder.transformer.encoder.layers",
        ),
        ("model.pixel_level_module.decoder.input_projections", "sem_seg_head.pixel_decoder.input_proj"),
        ("model.pixel_level_module.decoder.mask_projection", "sem_seg_head.pixel_decoder.mask_features"),
        ("model.pixel_level_module.decoder", "sem_seg_head.pixel_decoder"),
        ("model.transformer_module.queries_features", "sem_seg_head.predictor.query_feat"),
        ("model.transformer_module.queries_embedder", "sem_seg_head.predictor.query_embed"),
        ("model.transformer_module.level_embed", "sem_seg_head.predictor.level_embed"),
        ("model.transformer_module.decoder.layernorm", "sem_seg_head.predictor.decoder_norm"),
        ("class_predictor", "sem_seg_head.predictor.class_embed"),
    ]
    stage = re.match(r"model\.pixel_level_module\.encoder\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name)
    if stage:
        rest = re.sub(r"layer\.(\d)\.", lambda m: f"conv{int(m.group(1)) + 1}.", stage.group(3))
        rest = rest.replace("convolution.", "").replace("normalization.", "norm.")
        return f"backbone.res{int(stage.group(1)) + 2}.{stage.group(2)}.{rest}"
    layer = re.match(r"model\.transformer_module\.decoder\.layers\.(\d+)\.(.*)", name)
    if layer:
        number, rest = layer.groups()
        start = f"sem_seg_head.predictor.transformer_%s_layers.{number}."
        for old, new in (
            ("cross_attn.", start % "cross_attention" + "multihead_attn."),
            ("cross_attn_layer_norm.", start % "cross_attention" + "norm."),
            ("self_attn.", start % "self_attention" + "self_attn."),
            ("self_attn_layer_norm.", start % "self_attention" + "norm."),
            ("fc1.", start % "ffn" + "linear1."),
            ("fc2.", start % "ffn" + "linear2."),
            ("final_layer_norm.", start % "ffn" + "norm."),
        ):
            if rest.startswith(old):
                return new + rest.removeprefix(old)
    mask = re.match(r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.(.*)", name)
    if mask:
        return f"sem_seg_head.predictor.mask_embed.layers.{mask.group(1)}.{mask.group(2)}"
    for old, new in rules:
        if name.startswith(old):
            name = name.replace(old, new, 1)
            break
    if "transformer.encoder" in name:
        for old, new in (
            ("self_attn_layer_norm", "norm1"),
            ("final_layer_norm", "norm2"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
        ):
            name = name.replace(f".{old}.", f".{new}.")
    for part in ("adapter_1", "layer_1"):
        name = name.replace(f"{part}.0.", f"{part}.").replace(f"{part}.1.", f"{part}.norm.")
    return name


@pytest.mark.slow
def test_an_official_file_and_a_hugging_face_folder_of_one_model_give_one_model(tmp_path):
    reference = random_mask2former("resnet50", **SMALL)
    ours, _, _ = to_ours(reference, tmp_path)
    official = {}
    fused = {}
    for name, tensor in reference.state_dict().items():
        part = re.match(r"(.*transformer_module.*self_attn\.)([qkv])_proj\.(weight|bias)", name)
        if part:
            fused.setdefault(f"{part.group(1)}in_proj_{part.group(3)}", {})[part.group(2)] = tensor
        elif "num_batches_tracked" not in name:
            official[to_official(name)] = tensor
    for name, parts in fused.items():
        official[to_official(name)] = torch.cat([parts[p] for p in "qkv"])
    torch.save({"model": official}, tmp_path / "official.pth")
    report = import_weights(tmp_path / "official.pth", tmp_path / "official.safetensors")
    assert report.reinitialized == ()
    again, _ = load_checkpoint(tmp_path / "official.safetensors")
    wanted = ours.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in again.state_dict().items())


def small_official(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """An official file of a small ResNet-50 model, made by our names."""
    torch.manual_seed(seed)
    config = Model(
        backbone=Backbone(pretrained=None),
        pixel_decoder=PixelDecoder(channels=32, layers=1, ffn=32),
        decoder=Decoder(queries=5, layers=2, ffn=32),
        pilot=Pilot(queries=0),
    )
    state = build_model(config, 4).state_dict()
    return {official_names(name)[0]: tensor for name, tensor in state.items()} | changes


def test_names_of_early_versions(tmp_path):
    tensors = {
        k.replace("query_feat", "static_query").replace("sem_seg_head.pixel_decoder", "sem_seg_head"): v
        for k, v in small_official().items()
    }
    torch.save({"model": tensors}, tmp_path / "old.pth")
    report = import_weights(tmp_path / "old.pth", tmp_path / "out.safetensors")
    assert report.reinitialized == report.left_over == ()


def test_unknown_tensors_are_reported_and_missing_ones_refused(tmp_path):
    tensors = small_official(**{"predictor.something": torch.zeros(3)})
    torch.save(tensors, tmp_path / "model.pth")
    report = import_weights(tmp_path / "model.pth", tmp_path / "out.safetensors")
    assert report.reinitialized == ()
    assert report.left_over == ("predictor.something",)
    assert ("backbone.stem.conv1.weight", "backbone.body.conv1.weight") in report.renamed
    assert "1 left over: predictor.something" in str(report)
    name = "sem_seg_head.predictor.decoder_norm.weight"
    del tensors[name]
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(InputError, match=f"transformer decoder 40 of 41.*'{name}' is missing"):
        import_weights(tmp_path / "model.pth", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_what_is_no_mask2former_is_refused(tmp_path):
    np_file = tmp_path / "model.pkl"
    np_file.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.zeros(3)}}))
    with pytest.raises(InputError, match="no official Mask2Former, MP-Former or MaskFormer checkpoint"):
        import_weights(np_file, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="there is no such file"):
        import_weights(tmp_path / "none.pth", tmp_path / "out.safetensors")
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        import_weights(np_file, tmp_path / "out.pth")
    tensors = small_official()
    del tensors["backbone.res2.0.conv3.weight"]
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="its backbone is none of resnet50"):
        import_weights(tmp_path / "odd.pth", tmp_path / "out.safetensors")


def test_a_class_head_of_another_data_set_is_left_as_it_was(tmp_path):
    torch.save({"model": small_official()}, tmp_path / "model.pth")
    import_weights(tmp_path / "model.pth", tmp_path / "out.safetensors")
    config, _ = read_metadata(tmp_path / "out.safetensors")
    model = build_model(config.model, 9)
    before = model.decoder.class_embed.weight.clone()
    report = load_weights(model, tmp_path / "out.safetensors")
    assert report.reinitialized == ("decoder.class_embed.weight", "decoder.class_embed.bias")
    assert torch.equal(model.decoder.class_embed.weight, before)
    imported, _ = load_checkpoint(tmp_path / "out.safetensors")
    assert torch.equal(model.decoder.query_feat.weight, imported.decoder.query_feat.weight)
    with pytest.raises(InputError, match=r"none of its .* tensors fits"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("names", "taken"),
    [(("cat", "dog"), True), (("dog", "cat"), False), (None, True)],
)
def test_a_class_head_goes_with_the_names_of_its_classes(tmp_path, names, taken):
    """As many classes are not the same classes; a file without names is believed."""
    config = Config(
        model=Model(
            backbone=Backbone(name="resnet10t", pretrained=None, norm="group_norm"),
            pixel_decoder=PixelDecoder(channels=16, layers=1, heads=2, ffn=16),
            decoder=Decoder(queries=4, layers=1, heads=2, ffn=16),
        )
    )

    def table(*names: str) -> ClassTable:
        return ClassTable(tuple(ClassInfo(name, i + 1, True, (0, 0, i)) for i, name in enumerate(names)))

    saved = build_model(config.model, table("cat", "dog"))
    save_file(saved.state_dict(), tmp_path / "a.safetensors", checkpoint_metadata(config, saved.classes))
    model = build_model(config.model, table(*names) if names else ClassTable.numbered(2))
    report = load_weights(model, tmp_path / "a.safetensors")
    of_classes = {
        f"decoder.{name}" for name in ("class_embed.weight", "class_embed.bias", "pilot_embed.weight")
    }
    assert set(report.reinitialized) == (set() if taken else of_classes)
    assert torch.equal(model.decoder.class_embed.weight, saved.decoder.class_embed.weight) == taken
    assert torch.equal(model.decoder.query_feat.weight, saved.decoder.query_feat.weight)
