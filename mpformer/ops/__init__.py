"""Compiled operators of the model: multi-scale deformable attention."""

from mpformer.ops.deform_attn import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
