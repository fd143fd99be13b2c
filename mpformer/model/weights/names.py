"""What each of our tensors is called in the official Mask2Former / MP-Former files and at Hugging Face.

One rule per kind of tensor, read in one direction only: our name -> the name, or names, in the other file.
Where several are given, our tensor is theirs laid one after the other along the first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Names = tuple[str, ...]
Rule = tuple[str, Callable[..., str | Names]]


def official_names(name: str) -> Names | None:
    """Names in an official Mask2Former or MP-Former checkpoint; None for what those files lack."""
    return translate(name, _OFFICIAL)


def huggingface_names(name: str) -> Names | None:
    """Names in the weights file of a Hugging Face Mask2Former folder; None for what those files lack."""
    return translate(name, _HUGGING_FACE)


def with_timm_backbone(names: Callable[[str], Names | None]) -> Callable[[str], Names | None]:
    """The same but for the backbone, which has timm's names in the wrapper of `transformers`."""

    def wrapped(name: str) -> Names | None:
        body = name.removeprefix("backbone.body.")
        return (f"{HUGGING_FACE_ENCODER}._backbone.{body}",) if body != name else names(name)

    return wrapped


def translate(name: str, rules: Sequence[Rule]) -> Names | None:
    for pattern, build in rules:
        if match := re.fullmatch(pattern, name):
            names = build(*match.groups())
            return (names,) if isinstance(names, str) else names
    return None


_PIXELS = "sem_seg_head.pixel_decoder"
_QUERIES = "sem_seg_head.predictor"
_CROSS, _SELF, _FFN = (
    f"{_QUERIES}.transformer_{k}_layers" for k in ("cross_attention", "self_attention", "ffn")
)

OFFICIAL_BACKBONE: tuple[Rule, ...] = (
    # ResNets as in detectron2; the deeper stem of R101c has three convolutions
    (r"backbone\.body\.conv1\.weight", lambda: "backbone.stem.conv1.weight"),
    (r"backbone\.body\.bn1\.(.*)", lambda x: f"backbone.stem.conv1.norm.{x}"),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.(.*)",
        lambda stage, block, conv, x: f"backbone.res{int(stage) + 1}.{block}.conv{conv}.{x}",
    ),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.(.*)",
        lambda stage, block, conv, x: f"backbone.res{int(stage) + 1}.{block}.conv{conv}.norm.{x}",
    ),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0\.(.*)",
        lambda stage, block, x: f"backbone.res{int(stage) + 1}.{block}.shortcut.{x}",
    ),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1\.(.*)",
        lambda stage, block, x: f"backbone.res{int(stage) + 1}.{block}.shortcut.norm.{x}",
    ),
    # Swin: merging patches belongs to the stage before
    (r"backbone\.body\.(patch_embed\..*)", lambda x: f"backbone.{x}"),
    (
        r"backbone\.body\.layers_(\d)\.downsample\.(.*)",
        lambda stage, x: f"backbone.layers.{int(stage) - 1}.downsample.{x}",
    ),
    (r"backbone\.body\.layers_(\d)\.(blocks\..*)", lambda stage, x: f"backbone.layers.{stage}.{x}"),
    (r"backbone\.norms\.(\d)\.(.*)", lambda stage, x: f"backbone.norm{stage}.{x}"),
)

_OFFICIAL: tuple[Rule, ...] = (
    *OFFICIAL_BACKBONE,
    (r"pixel_decoder\.level_embed", lambda: f"{_PIXELS}.transformer.level_embed"),
    (r"pixel_decoder\.layers\.(.*)", lambda x: f"{_PIXELS}.transformer.encoder.layers.{x}"),
    (r"pixel_decoder\.(input_proj|mask_features)\.(.*)", lambda part, x: f"{_PIXELS}.{part}.{x}"),
    (r"pixel_decoder\.lateral\.0\.(.*)", lambda x: f"{_PIXELS}.adapter_1.{x}"),
    (r"pixel_decoder\.lateral\.1\.(.*)", lambda x: f"{_PIXELS}.adapter_1.norm.{x}"),
    (r"pixel_decoder\.smooth\.0\.(.*)", lambda x: f"{_PIXELS}.layer_1.{x}"),
    (r"pixel_decoder\.smooth\.1\.(.*)", lambda x: f"{_PIXELS}.layer_1.norm.{x}"),
    (r"decoder\.layers\.(\d+)\.cross_attn\.(.*)", lambda i, x: f"{_CROSS}.{i}.multihead_attn.{x}"),
    (r"decoder\.layers\.(\d+)\.cross_norm\.(.*)", lambda i, x: f"{_CROSS}.{i}.norm.{x}"),
    (r"decoder\.layers\.(\d+)\.self_attn\.(.*)", lambda i, x: f"{_SELF}.{i}.self_attn.{x}"),
    (r"decoder\.layers\.(\d+)\.self_norm\.(.*)", lambda i, x: f"{_SELF}.{i}.norm.{x}"),
    (r"decoder\.layers\.(\d+)\.(linear\d)\.(.*)", lambda i, part, x: f"{_FFN}.{i}.{part}.{x}"),
    (r"decoder\.layers\.(\d+)\.ffn_norm\.(.*)", lambda i, x: f"{_FFN}.{i}.norm.{x}"),
    (r"decoder\.norm\.(.*)", lambda x: f"{_QUERIES}.decoder_norm.{x}"),
    (r"decoder\.pilot_embed\.(.*)", lambda x: f"{_QUERIES}.label_enc.{x}"),
    (r"decoder\.(query_feat|query_embed|level_embed|class_embed|mask_embed)\.(.*)",
     lambda part, x: f"{_QUERIES}.{part}.{x}"),
)  # fmt: skip

HUGGING_FACE_ENCODER = "model.pixel_level_module.encoder"
_PIXEL_LEVEL = "model.pixel_level_module.decoder"
_TRANSFORMER = "model.transformer_module"
_LAYERS = f"{_TRANSFORMER}.decoder.layers"
_SWIN_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ENCODER_PARTS = {
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
}
_DECODER_PARTS = {
    "cross_norm": "cross_attn_layer_norm",
    "self_norm": "self_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
}


def _swin_block(stage: str, block: str) -> str:
    return f"{HUGGING_FACE_ENCODER}.encoder.layers.{stage}.blocks.{block}"


def _resnet_block(stage: str, block: str) -> str:
    return f"{HUGGING_FACE_ENCODER}.encoder.stages.{int(stage) - 1}.layers.{block}"


HUGGING_FACE_BACKBONE: tuple[Rule, ...] = (
    (r"backbone\.body\.conv1\.(.*)", lambda x: f"{HUGGING_FACE_ENCODER}.embedder.embedder.convolution.{x}"),
    (r"backbone\.body\.bn1\.(.*)", lambda x: f"{HUGGING_FACE_ENCODER}.embedder.embedder.normalization.{x}"),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.(.*)",
        lambda s, b, conv, x: f"{_resnet_block(s, b)}.layer.{int(conv) - 1}.convolution.{x}",
    ),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.(.*)",
        lambda s, b, conv, x: f"{_resnet_block(s, b)}.layer.{int(conv) - 1}.normalization.{x}",
    ),
    (
        r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.(0|1)\.(.*)",
        lambda s, b, which, x: (
            f"{_resnet_block(s, b)}.shortcut.{('convolution', 'normalization')[int(which)]}.{x}"
        ),
    ),
    (
        r"backbone\.body\.patch_embed\.proj\.(.*)",
        lambda x: f"{HUGGING_FACE_ENCODER}.embeddings.patch_embeddings.projection.{x}",
    ),
    (r"backbone\.body\.patch_embed\.norm\.(.*)", lambda x: f"{HUGGING_FACE_ENCODER}.embeddings.norm.{x}"),
    (
        r"backbone\.body\.layers_(\d)\.downsample\.(.*)",
        lambda stage, x: f"{HUGGING_FACE_ENCODER}.encoder.layers.{int(stage) - 1}.downsample.{x}",
    ),
    (
        r"backbone\.body\.layers_(\d)\.blocks\.(\d+)\.attn\.qkv\.(.*)",
        lambda s, b, x: tuple(
            f"{_swin_block(s, b)}.attention.self.{p}.{x}" for p in ("query", "key", "value")
        ),
    ),
    (
        r"backbone\.body\.layers_(\d)\.blocks\.(\d+)\.attn\.(relative_position_bias_table)",
        lambda s, b, x: f"{_swin_block(s, b)}.attention.self.{x}",
    ),
    (
        r"backbone\.body\.layers_(\d)\.blocks\.(\d+)\.(norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.(.*)",
        lambda s, b, part, x: f"{_swin_block(s, b)}.{_SWIN_PARTS[part]}.{x}",
    ),
    (
        r"backbone\.norms\.(\d)\.(.*)",
        lambda i, x: f"{HUGGING_FACE_ENCODER}.hidden_states_norms.stage{int(i) + 1}.{x}",
    ),
)

_HUGGING_FACE: tuple[Rule, ...] = (
    *HUGGING_FACE_BACKBONE,
    (r"pixel_decoder\.level_embed", lambda: f"{_PIXEL_LEVEL}.level_embed"),
    (r"pixel_decoder\.input_proj\.(.*)", lambda x: f"{_PIXEL_LEVEL}.input_projections.{x}"),
    (
        r"pixel_decoder\.layers\.(\d+)\.self_attn\.(.*)",
        lambda i, x: f"{_PIXEL_LEVEL}.encoder.layers.{i}.self_attn.{x}",
    ),
    (
        r"pixel_decoder\.layers\.(\d+)\.(\w+)\.(.*)",
        lambda i, part, x: f"{_PIXEL_LEVEL}.encoder.layers.{i}.{_ENCODER_PARTS[part]}.{x}",
    ),
    (r"pixel_decoder\.lateral\.(.*)", lambda x: f"{_PIXEL_LEVEL}.adapter_1.{x}"),
    (r"pixel_decoder\.smooth\.(.*)", lambda x: f"{_PIXEL_LEVEL}.layer_1.{x}"),
    (r"pixel_decoder\.mask_features\.(.*)", lambda x: f"{_PIXEL_LEVEL}.mask_projection.{x}"),
    (r"decoder\.query_feat\.(.*)", lambda x: f"{_TRANSFORMER}.queries_features.{x}"),
    (r"decoder\.query_embed\.(.*)", lambda x: f"{_TRANSFORMER}.queries_embedder.{x}"),
    (r"decoder\.level_embed\.(.*)", lambda x: f"{_TRANSFORMER}.level_embed.{x}"),
    (r"decoder\.layers\.(\d+)\.cross_attn\.(.*)", lambda i, x: f"{_LAYERS}.{i}.cross_attn.{x}"),
    (
        r"decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
        lambda i, x: tuple(f"{_LAYERS}.{i}.self_attn.{part}_proj.{x}" for part in "qkv"),
    ),
    (r"decoder\.layers\.(\d+)\.self_attn\.(out_proj\..*)", lambda i, x: f"{_LAYERS}.{i}.self_attn.{x}"),
    (r"decoder\.layers\.(\d+)\.(\w+)\.(.*)", lambda i, part, x: f"{_LAYERS}.{i}.{_DECODER_PARTS[part]}.{x}"),
    (r"decoder\.norm\.(.*)", lambda x: f"{_TRANSFORMER}.decoder.layernorm.{x}"),
    (
        r"decoder\.mask_embed\.layers\.(\d)\.(.*)",
        lambda i, x: f"{_TRANSFORMER}.decoder.mask_predictor.mask_embedder.{i}.0.{x}",
    ),
    (r"decoder\.class_embed\.(.*)", lambda x: f"class_predictor.{x}"),
)
