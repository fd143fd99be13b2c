"""Mask2Former of `transformers` with random weights: an independent implementation to compare with."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mpformer.model import backbone  # noqa: F401  (makes torchvision importable beside a CPU build of torch)

import transformers  # isort: skip
from safetensors.torch import load_file

from mpformer.model.weights.loading import import_weights, load_checkpoint
from mpformer.model.weights.names import huggingface_names
from mpformer.types import PIXEL_MEAN, PIXEL_STD

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_layers": 2,
    "encoder_feedforward_dim": 96,
    "dim_feedforward": 128,
    "num_queries": 12,
    "train_num_points": 112,
}
"""Both decoders at a size for quick tests; nine layers and eight heads as ever."""


def random_mask2former(kind: str, seed: int = 0, labels: int = 7, gain: float = 1.0, **settings) -> nn.Module:
    """A model whose every tensor is random: also norms, BatchNorm statistics and sampling offsets.

    A smaller `gain` makes the function smoother, so that float32 gradients have digits to compare.
    """
    if kind == "swin_tiny":
        body = transformers.SwinConfig(out_features=STAGES)
    elif kind == "resnet50":
        body = transformers.ResNetConfig(out_features=STAGES)
    else:
        body = transformers.ResNetConfig(
            out_features=STAGES, layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
        )
    torch.manual_seed(seed)
    config = transformers.Mask2FormerConfig(backbone_config=body, num_labels=labels, **settings)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
                module.weight.uniform_(1 - 0.3 * gain, 1 + 0.3 * gain)
                module.bias.normal_(std=0.2 * gain)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1 * gain)
            elif "relative_position_bias" in name or name.endswith("proj.bias") or "level_embed" in name:
                parameter.normal_(std=0.3 * gain)
            elif "class_predictor" in name or "mask_embedder" in name:
                parameter.normal_(std=0.2 * gain)
    return model


def to_ours(model: nn.Module, folder: Path):
    """The same model in our implementation, by way of the files of both."""
    model.save_pretrained(folder / "hf")
    report = import_weights(folder / "hf", folder / "ours.safetensors")
    ours, config = load_checkpoint(folder / "ours.safetensors")
    return ours, config, report


def normalized(images: Tensor) -> Tensor:
    """What `transformers` takes where we take `images`."""
    mean = torch.tensor(PIXEL_MEAN, dtype=images.dtype).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, dtype=images.dtype).view(3, 1, 1)
    return (images - mean) / std


def gradients_by_our_names(model: nn.Module, own_names, folder: Path) -> dict[str, Tensor]:
    """The gradients of a `transformers` model under our names: written as if they were its weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    return {name: torch.cat([stored[n] for n in huggingface_names(name)]) for name in own_names}
