"""Small models in the files of several programs, whole, wrapped and spoilt."""

import functools
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpformer.config import Config
from mpformer.config import data as config_data
from mpformer.config.model import Backbone, Decoder, Model, Pilot, PixelDecoder
from mpformer.model.architecture import Architecture, build_model
from mpformer.model.weights.huggingface_export import write_huggingface
from mpformer.model.weights.loading import checkpoint_metadata
from mpformer.model.weights.names import official_names
from mpformer.types import ClassInfo, ClassTable, InputError

NAMES = ("cat", "dog", "bird")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 176035123\n"
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def table(*names: str) -> ClassTable:
    return ClassTable(tuple(ClassInfo(name, i, True, (0, 0, i)) for i, name in enumerate(names)))


def small_config(backbone: str = "resnet18", norm: str = "frozen_bn", **decoder) -> Model:
    """ResNet-18 (or another), 32 channels, one layer and two layers; as official files, with 8 heads."""
    return Model(
        backbone=Backbone(name=backbone, pretrained=None, norm=norm),
        pixel_decoder=PixelDecoder(channels=32, layers=1, ffn=32),
        decoder=Decoder(**{"queries": 5, "layers": 2, "ffn": 32} | decoder),
        pilot=Pilot(queries=0),
    )


def small_model(config: Model | None = None, names: tuple[str, ...] = NAMES, seed: int = 0) -> Architecture:
    """A model whose every tensor is random, norms, their statistics and their counters, too."""
    torch.manual_seed(seed)
    model = build_model(config or small_config(), table(*names))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(17)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def save_ours(model: Architecture, file: Path, prefix: str = "") -> Path:
    """A checkpoint's model file, with something before every name."""
    tensors = {prefix + k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, file, checkpoint_metadata(Config(model=model.config), model.classes))
    return file


@functools.cache
def official(backbone: str = "resnet50") -> dict[str, torch.Tensor]:
    """The tensors of a small official file, made by our names. Not to be changed."""
    state = small_model(small_config(backbone)).state_dict()
    return {official_names(name)[0]: tensor for name, tensor in state.items()}


def write_folder(folder: Path, model: Architecture | None = None) -> Path:
    """A Hugging Face folder of a small model."""
    write_huggingface(model or small_model(), folder, config_data.TestResize())
    return folder


def change_tensors(folder: Path, change) -> Path:
    """Replace the tensors of a Hugging Face folder by `change(tensors)`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_settings(folder: Path, change) -> Path:
    """Let `change` alter the config.json of a Hugging Face folder in place."""
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(call, *expected: str) -> str:
    """The one line by which an input is refused; it has to hold each of `expected`."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    for text in expected:
        assert text in line
    return line


def torch_bytes(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@functools.cache
def cached_model() -> Architecture:
    """`small_model`, made once; not to be changed."""
    return small_model()


def shard(folder) -> dict:
    """Lay the tensors of a folder into two shards with an index; the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in halves.items():
        save_file({n: tensors[n] for n in inside}, folder / file)
    index = {"weight_map": {n: file for file, inside in halves.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index
