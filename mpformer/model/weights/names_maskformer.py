"""What a MaskFormer's tensors are called in official files and at Hugging Face; see `weights_names`."""

from __future__ import annotations

from mpformer.model.weights.names import HUGGING_FACE_BACKBONE, OFFICIAL_BACKBONE, Names, Rule, translate


def official_maskformer_names(name: str) -> Names | None:
    """Names in an official MaskFormer checkpoint; None for what those files lack."""
    return translate(name, _OFFICIAL)


def huggingface_maskformer_names(name: str) -> Names | None:
    """Names in the weights file of a Hugging Face MaskFormer folder; None for what those files lack."""
    names = translate(name, _HUGGING_FACE)
    if names is not None and name.startswith(("backbone.body.layers_", "backbone.body.patch_embed.")):
        # its Swin stands one level deeper there than Mask2Former's
        return tuple(n.replace(f"{_ENCODER}.", f"{_ENCODER}.model.", 1) for n in names)
    return names


_PIXELS = "sem_seg_head.pixel_decoder"
_QUERIES = "sem_seg_head.predictor"
_LAYER = f"{_QUERIES}.transformer.decoder.layers"
_PARTS = {
    "self_attn": "self_attn",
    "cross_attn": "multihead_attn",
    "linear1": "linear1",
    "linear2": "linear2",
    "self_norm": "norm1",
    "cross_norm": "norm2",
    "ffn_norm": "norm3",
}

_OFFICIAL: tuple[Rule, ...] = (
    *OFFICIAL_BACKBONE,
    # levels are numbered from the finest there, from the coarsest here
    (
        r"pixel_decoder\.laterals\.(\d)\.0\.(.*)",
        lambda i, x: f"{_PIXELS}.adapter_{3 - int(i)}.{x}",
    ),
    (
        r"pixel_decoder\.laterals\.(\d)\.1\.(.*)",
        lambda i, x: f"{_PIXELS}.adapter_{3 - int(i)}.norm.{x}",
    ),
    (r"pixel_decoder\.outputs\.(\d)\.0\.(.*)", lambda i, x: f"{_PIXELS}.layer_{4 - int(i)}.{x}"),
    (r"pixel_decoder\.outputs\.(\d)\.1\.(.*)", lambda i, x: f"{_PIXELS}.layer_{4 - int(i)}.norm.{x}"),
    (r"pixel_decoder\.mask_features\.(.*)", lambda x: f"{_PIXELS}.mask_features.{x}"),
    (r"encoder\.input_proj\.(.*)", lambda x: f"{_PIXELS}.input_proj.{x}"),
    (r"encoder\.layers\.(.*)", lambda x: f"{_PIXELS}.transformer.encoder.layers.{x}"),
    (
        r"decoder\.layers\.(\d+)\.(\w+)\.(.*)",
        lambda i, part, x: f"{_LAYER}.{i}.{_PARTS[part]}.{x}",
    ),
    (r"decoder\.norm\.(.*)", lambda x: f"{_QUERIES}.transformer.decoder.norm.{x}"),
    (
        r"decoder\.(query_embed|input_proj|class_embed|mask_embed)\.(.*)",
        lambda part, x: f"{_QUERIES}.{part}.{x}",
    ),
)

_ENCODER = "model.pixel_level_module.encoder"
_FPN = "model.pixel_level_module.decoder.fpn"
_TRANSFORMER = "model.transformer_module"
_HF_LAYER = f"{_TRANSFORMER}.decoder.layers"
_HF_PARTS = {
    "self_attn": "self_attn",
    "cross_attn": "encoder_attn",
    "linear1": "fc1",
    "linear2": "fc2",
    "self_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
}


_HUGGING_FACE: tuple[Rule, ...] = (
    (r"backbone\.norms\.(\d)\.(.*)", lambda i, x: f"{_ENCODER}.hidden_states_norms.{i}.{x}"),
    *HUGGING_FACE_BACKBONE,
    (r"pixel_decoder\.laterals\.(\d)\.(.*)", lambda i, x: f"{_FPN}.layers.{i}.proj.{x}"),
    (r"pixel_decoder\.outputs\.0\.(.*)", lambda x: f"{_FPN}.stem.{x}"),
    (r"pixel_decoder\.outputs\.(\d)\.(.*)", lambda i, x: f"{_FPN}.layers.{int(i) - 1}.block.{x}"),
    (
        r"pixel_decoder\.mask_features\.(.*)",
        lambda x: f"model.pixel_level_module.decoder.mask_projection.{x}",
    ),
    (
        r"decoder\.layers\.(\d+)\.(self_attn|cross_attn)\.in_proj_(weight|bias)",
        lambda i, part, x: tuple(f"{_HF_LAYER}.{i}.{_HF_PARTS[part]}.{p}_proj.{x}" for p in "qkv"),
    ),
    (
        r"decoder\.layers\.(\d+)\.(\w+)\.(.*)",
        lambda i, part, x: f"{_HF_LAYER}.{i}.{_HF_PARTS[part]}.{x}",
    ),
    (r"decoder\.norm\.(.*)", lambda x: f"{_TRANSFORMER}.decoder.layernorm.{x}"),
    (r"decoder\.query_embed\.(.*)", lambda x: f"{_TRANSFORMER}.queries_embedder.{x}"),
    (r"decoder\.input_proj\.(.*)", lambda x: f"{_TRANSFORMER}.input_projection.{x}"),
    (r"decoder\.mask_embed\.layers\.(\d)\.(.*)", lambda i, x: f"mask_embedder.{i}.0.{x}"),
    (r"decoder\.class_embed\.(.*)", lambda x: f"class_predictor.{x}"),
)
