"""Models as ONNX files: in ONNX Runtime they compute what they compute in torch."""

import copy
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpformer.config.model import Backbone, Model
from mpformer.model import export_onnx as exporting
from mpformer.model.architecture import build_model
from mpformer.model.export_onnx import export_onnx, output_names, to_onnx
from mpformer.types import InputError, RunError
from tests.model.samples import tiny_model

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install -e .[export]"
)


def settings(pixel: dict | None = None, decoder: dict | None = None, **sections: dict | str) -> Model:
    base = tiny_model(decoder={"layers": 2}).model_dump()
    base["backbone"] |= {"name": "test_resnet", "norm": "frozen_bn"}  # three times as quick to export
    for part, changed in (("pixel_decoder", pixel), ("decoder", decoder)):
        base[part] |= changed or {}
    return Model(**base | sections)


MASKFORMER = {
    "layers": 2,
    "attention": "cross",
    "features": "stride_32",
    "memory": "backbone",
    "query_features": "zero",
    "order": "self_first",
    "encoder_layers": 1,
}
MODELS = {
    "mp-former": settings(decoder={"layers": 1}),
    "two levels deep, all scales": settings({"layers": 2}, {"features": "all_scales"}),
    "cross attention": settings({"kind": "semantic_fpn"}, {"attention": "cross", "layers": 1}),
    "smca": settings({"kind": "bifpn"}, {"attention": "smca", "layers": 1}),
    "mask pooling, fapn": settings({"kind": "fapn"}, {"attention": "mask_pooling", "layers": 2}),
    "maskformer": settings({"kind": "fpn"}, MASKFORMER),
    "per pixel": settings(
        {"kind": "fpn"}, {**MASKFORMER, "layers": 0}, output="per_pixel", pilot={"queries": 0}
    ),
}


def random_model(config: Model, seed: int = 0) -> torch.nn.Module:
    """Every parameter is random: sampling offsets, which start on a grid, lead outside of the map, too."""
    torch.manual_seed(seed)
    model = build_model(config, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name:
                parameter.add_(torch.randn_like(parameter) * 2)
            elif "attention_weights" in name or "mask_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def images(count: int, size: tuple[int, int] = (64, 96), dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 7, generator=random)
    return (torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).to(dtype)


def opened(content: bytes):
    """In one thread: ONNX Runtime's threads spin while they wait for each other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options)


def assert_same(model: torch.nn.Module, content: bytes, *batches: torch.Tensor) -> None:
    session = opened(content)
    for given in batches:
        assert_same_outputs(model, session, given)


def assert_same_outputs(model: torch.nn.Module, session, given: torch.Tensor) -> None:
    found = session.run(output_names(model), {"images": given.numpy()})
    with torch.no_grad():
        head = model(given).heads[-1]
    wanted = [head.mask_logits] if head.class_logits is None else [head.class_logits, head.mask_logits]
    assert len(found) == len(wanted)
    for values, tensor in zip(found, wanted):
        assert tensor.std() > 1e-2  # not trivially flat
        np.testing.assert_allclose(values, tensor.numpy(), atol=2e-4 * float(tensor.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def exported():
    """MP-Former and its file, for any number of images."""
    model = random_model(MODELS["mp-former"])
    return model, to_onnx(model, images(1), {"task": "instance"}, any_batch=True)


def test_it_computes_the_same_for_any_number_of_images(exported):
    model, content = exported
    session = opened(content)
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 96]
    assert [one.shape for one in session.get_outputs()] == [["batch", 7, 4], ["batch", 7, 16, 24]]
    assert session.get_modelmeta().custom_metadata_map == {"task": "instance"}
    assert_same(model, content, images(1), images(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "mp-former"])
def test_so_does_every_other_kind(kind):
    model = random_model(MODELS[kind])
    content = to_onnx(model, images(1), {}, any_batch=True)
    assert_same(model, content, images(1), images(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "tf_efficientnet_lite0", "regnetx_002"])
def test_backbones(name):
    """Below the smallest of decoders: the others stand on the same four maps."""
    backbone = Backbone(name=name, pretrained=None, norm="bn")
    model = random_model(MODELS["per pixel"].model_copy(update={"backbone": backbone}))
    assert_same(model, to_onnx(model, images(1, (96, 160)), {}, any_batch=True), images(2, (96, 160)))


@pytest.mark.slow
def test_float_images_and_a_fixed_number(tmp_path):
    model, given = random_model(MODELS["maskformer"]), images(2, dtype=torch.float32)
    export_onnx(model, tmp_path / "a.onnx", given, {}, batch=2)
    content = (tmp_path / "a.onnx").read_bytes()
    session = opened(content)
    assert (session.get_inputs()[0].type, session.get_inputs()[0].shape) == ("tensor(float)", [2, 3, 64, 96])
    assert_same(model, content, given)


def test_it_is_written_where_it_computes_the_same_and_not_otherwise(exported, tmp_path, monkeypatch):
    model, content = exported
    monkeypatch.setattr(exporting, "to_onnx", lambda *_, **options: content)
    lines = []
    found = export_onnx(model, tmp_path / "new" / "a.onnx", images(2), {}, report=lines.append)
    assert (tmp_path / "new" / "a.onnx").read_bytes() == content
    assert set(found.errors) == {"class_logits", "mask_logits"}
    assert all("largest error" in line and "ms per image" in line for line in lines)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decoder.class_embed.bias.add_(0.1)
    with pytest.raises(RunError, match=r"b\.onnx: not written: in ONNX Runtime class_logits differ"):
        export_onnx(other, tmp_path / "b.onnx", images(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_missing_package_is_one_line(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else real(name, *a)
    )
    with pytest.raises(
        InputError, match=r"^export: not installed: onnx, onnxscript, onnxruntime: pip install onnx "
    ):
        exporting.require_onnx()


def test_what_onnx_runtime_raises_is_one_line(exported, tmp_path, monkeypatch):
    model, content = exported
    for wrong, given in ((b"no model", images(2)), (content, images(2, (96, 64)))):  # to load, and to run
        monkeypatch.setattr(exporting, "to_onnx", lambda *_, wrong=wrong, **options: wrong)
        with pytest.raises(RunError, match=r"^export: not written: ONNX Runtime fails on the file: ") as told:
            export_onnx(model, tmp_path / "a.onnx", given, {})
        assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_a_file_is_refused_before_it_is_exported(exported, monkeypatch):
    model, _ = exported
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **options: pytest.fail("exported"))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    monkeypatch.setattr(exporting, "_LARGEST", weights - 1)
    with pytest.raises(InputError, match=r"^export: .* at most 2 GiB; this model has 0\.0\d GiB"):
        to_onnx(model, images(1), {}, any_batch=True)


@pytest.mark.parametrize("serialized", [b"xxxx", None], ids=["too many bytes", "protobuf refuses"])
def test_a_file_that_has_become_too_large_is_refused(exported, monkeypatch, serialized):
    """Constants of the graph count, too; protobuf raises an exception of its own beyond 2 GiB."""

    def serialize():
        if serialized is None:
            raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB: 3000000000")
        return serialized

    made = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), model_proto=SimpleNamespace(SerializeToString=serialize)
    )
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **options: made)
    sizes = iter([0, 1 << 31])
    check = exporting._check_size
    monkeypatch.setattr(exporting, "_check_size", lambda size: check(next(sizes)))
    with pytest.raises(InputError, match=r"^export: an ONNX file holds at most 2 GiB"):
        to_onnx(exported[0], images(1), {}, any_batch=True)
