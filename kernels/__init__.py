"""Fused Triton kernels: GroupNorm + SiLU (of sums too), the EMA update, Adam + EMA in one pass, merged gradients."""

from kernels.adam_ema import adam_ema_
from kernels.add_group_norm_silu import add_group_norm_silu
from kernels.caching import tag_caches
from kernels.ema import ema_update_
from kernels.group_norm_silu import group_norm_silu
from kernels.merge_columns import linear_qkv, merge_columns
from kernels.registry import REGISTRY
from kernels.upsample_conv import upsample_conv

__all__ = [
    "REGISTRY",
    "adam_ema_",
    "add_group_norm_silu",
    "ema_update_",
    "group_norm_silu",
    "linear_qkv",
    "merge_columns",
    "upsample_conv",
]

tag_caches()
