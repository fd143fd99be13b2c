"""Names of `transformers` 5 in memory, brought to those of its files.

`save_pretrained` gives some tensors the names that they had in earlier versions. A program that stores the
state dict itself, as training loops around a model do, writes the names in memory.
"""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(model\.pixel_level_module\.encoder)\.swin\.(embeddings|encoder)\.", r"\1.\2."),
        (r"(\.blocks\.\d+\.attention)\.q_proj\.", r"\1.self.query."),
        (r"(\.blocks\.\d+\.attention)\.k_proj\.", r"\1.self.key."),
        (r"(\.blocks\.\d+\.attention)\.v_proj\.", r"\1.self.value."),
        (r"(\.blocks\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
        (r"(\.blocks\.\d+\.attention)\.relative_position_bias\.", r"\1.self."),
        (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
        (r"^(model\.transformer_module\.decoder\.layers\.\d+\.\w+)\.o_proj\.", r"\1.out_proj."),
        (r"^(model\.transformer_module\.decoder\.layers\.\d+)\.mlp\.(fc\d)\.", r"\1.\2."),
    )
)


def name_in_files(name: str) -> str:
    """The name that `save_pretrained` gives the tensor of a Mask2Former or MaskFormer; most are the same."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
