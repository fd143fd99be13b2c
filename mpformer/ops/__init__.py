"""Compiled operators of the model: multi-scale deformable attention."""

from mpformer.ops.deform_attn import ms_deform_attn, ms_deform_attn_fused
from mpformer.ops.status import KernelStatus, kernel_status

__all__ = ["KernelStatus", "kernel_status", "ms_deform_attn", "ms_deform_attn_fused"]
