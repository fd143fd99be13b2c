"""Our Mask2Former or MaskFormer written as a Hugging Face folder, where `transformers` has an equal of it.

`huggingface_forms` has what each of the two can hold. Pilot embeddings are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpformer import atomic
from mpformer.config.data import TestResize
from mpformer.config.model import Backbone
from mpformer.model.architecture import Architecture
from mpformer.model.segmenter import Segmenter
from mpformer.model.weights.huggingface_forms import form_of
from mpformer.types import PIXEL_MEAN, PIXEL_STD, InputError, RunError

_NO_LIMIT = 1 << 20
"""Pixels; where `transformers` must be given a size."""


def write_huggingface(model: Architecture, folder: Path, resize: TestResize) -> None:
    """Write config.json, preprocessor_config.json (with the model's `resize` for evaluation) and
    model.safetensors.

    Pilot embeddings are left out: inference does not use them. Raises `InputError` for a model that
    `transformers` has no equal of.
    """
    if not isinstance(model, Segmenter):
        raise InputError(f"export: transformers' Mask2Former cannot hold a {type(model).__name__}")
    form = form_of(model)
    names_of = form.names_of(model)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.pilot_embed")}
    unknown = next((f"it has no {k}" for k in own if names_of(k) is None), None)
    if reason := form.refusal(model) or unknown:
        raise InputError(
            f"export: transformers' {form.title} cannot hold this model: {reason}; an ONNX file can: "
            "`mpformer export CHECKPOINT OUT.onnx`"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        names = names_of(name) or ()
        parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)  # a number alone has no chunks
        tensors.update(zip(names, parts))
    tensors = form.unused(model) | _counts(tensors) | tensors
    processor = {
        "image_processor_type": f"{form.title}ImageProcessor",
        **_to_preprocessor(model.config.backbone, resize),
    }
    texts = {"config": form.settings(model), "preprocessor_config": processor}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file: the name of a folder to write is expected")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(folder / "model.safetensors") as partial:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
        for name, content in texts.items():
            atomic.write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder}: the export cannot be written: {reason}") from error


def _counts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batches that live statistics have seen, which frozen ones have not counted."""
    # a backbone of timm is frozen there, too, and counts nothing
    means = [name for name in tensors if name.endswith("running_mean") and "._backbone." not in name]
    return {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}


def _to_preprocessor(backbone: Backbone, resize: TestResize) -> dict[str, Any]:
    if resize.short is not None:
        size = {"shortest_edge": resize.short, "longest_edge": resize.long or _NO_LIMIT}
    else:
        size = {"max_height": resize.long or _NO_LIMIT, "max_width": resize.long or _NO_LIMIT}
    return {
        "do_resize": resize.short is not None or resize.long is not None,
        "size": size,
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in backbone.mean or PIXEL_MEAN],
        "image_std": [std / 255 for std in backbone.std or PIXEL_STD],
    }
