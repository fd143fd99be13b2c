"""Wrapped, headless and batch-norm files as `transformers` and torch themselves write and read them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpformer.config.model import Backbone, Decoder, Model, Pilot, PixelDecoder
from mpformer.model.weights.loading import export_huggingface, import_weights, load_checkpoint
from mpformer.types import InputError
from tests.model import weights_files as files
from tests.model.hugging_face import SMALL, normalized, random_mask2former, transformers
from tests.model.test_maskformer import SMALL as SMALL_MASKFORMER
from tests.model.test_maskformer import random_maskformer

pytestmark = pytest.mark.slow


class Lightning(nn.Module):
    """The shape of a LightningModule around a model: an attribute `model`, a loss with a buffer beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))


KINDS = ["mask2former", "mask2former swin", "maskformer", "maskformer swin"]


def models():
    return {
        "mask2former": random_mask2former("resnet18", **SMALL),
        "mask2former swin": random_mask2former("swin_tiny", **SMALL),
        "maskformer": random_maskformer("resnet50", **SMALL_MASKFORMER),
        "maskformer swin": random_maskformer("swin_tiny", **SMALL_MASKFORMER),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{kind: (model, its folder, our tensors of it)}"""
    folder = tmp_path_factory.mktemp("saved")
    result = {}
    for kind, model in models().items():
        model.save_pretrained(folder / kind)
        report = import_weights(folder / kind, folder / f"{kind}.safetensors")
        assert report.reinitialized == ()
        result[kind] = (model, folder / kind, load_file(folder / f"{kind}.safetensors"))
    return result


WRAPPERS = {
    "DataParallel": lambda model: nn.DataParallel(model).state_dict(),
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "compile": lambda model: torch.compile(model).state_dict(),
    "compiled DataParallel": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    "Lightning": lambda model: {"epoch": 3, "state_dict": Lightning(model).state_dict(), "loops": {"a": {}}},
    "training": lambda model: {"model": model.state_dict(), "optimizer": _optimizer_of(model).state_dict()},
    "plain": lambda model: model.state_dict(),
}


def _optimizer_of(model):
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_torch_s_wrappers_save_is_the_model(wrapper, kind, saved, tmp_path):
    model, folder, wanted = saved[kind]
    files.copy_of(folder, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(WRAPPERS[wrapper](model), tmp_path / "hf" / "pytorch_model.bin")
    report = import_weights(tmp_path / "hf", tmp_path / "out.safetensors")
    assert report.reinitialized == ()
    assert files.same(load_file(tmp_path / "out.safetensors"), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_without_a_head_is_refused(kind, saved, tmp_path):
    model, _, _ = saved[kind]
    model.model.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"class head 0 of 2.*'class_predictor\.weight' is missing"):
        import_weights(tmp_path / "base", tmp_path / "out.safetensors")
    model.model.pixel_level_module.encoder.save_pretrained(tmp_path / "backbone")
    with pytest.raises(
        InputError,
        match=r"model_type 'mask2former' or 'maskformer' is expected, not '(resnet|swin|maskformer-swin)'",
    ):
        import_weights(tmp_path / "backbone", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_shards_of_transformers(saved, tmp_path):
    model, _, wanted = saved["mask2former"]
    model.save_pretrained(tmp_path / "hf", max_shard_size="20MB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert import_weights(tmp_path / "hf", tmp_path / "out.safetensors").reinitialized == ()
    assert files.same(load_file(tmp_path / "out.safetensors"), wanted)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_transformers_computes_what_an_exported_model_does(norm, tmp_path):
    config = Model(
        backbone=Backbone(name="resnet18", pretrained=None, norm=norm),
        pixel_decoder=PixelDecoder(channels=64, layers=1, ffn=64),
        decoder=Decoder(queries=6, layers=2, ffn=64),
        pilot=Pilot(queries=4),
    )
    ours = files.small_model(config)
    export_huggingface(files.save_ours(ours, tmp_path / "a.safetensors"), tmp_path / "hf")
    theirs, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(files.NAMES))
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    again, _ = load_checkpoint(tmp_path / "a.safetensors")
    with torch.no_grad():
        (head,) = again(images).heads
        out = theirs.eval()(normalized(images))
    assert out.masks_queries_logits.std() > 0.01
    torch.testing.assert_close(head.class_logits, out.class_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(head.mask_logits, out.masks_queries_logits, atol=1e-4, rtol=0)
