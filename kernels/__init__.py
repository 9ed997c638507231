"""Fused Triton kernels: GroupNorm + SiLU (of sums too), the EMA update, Adam + EMA in one pass, merged gradients."""

from .adam_ema import adam_ema_
from .add_group_norm_silu import add_group_norm_silu
from .caching import source_hash, tag_caches
from .cat_rows import cat_rows
from .ema import ema_update_
from .group_norm_silu import group_norm_silu
from .language import TRITON_INSTALLED
from .merge_columns import merge_columns
from .registry import REGISTRY

__all__ = [
    "REGISTRY",
    "TRITON_INSTALLED",
    "adam_ema_",
    "add_group_norm_silu",
    "cat_rows",
    "ema_update_",
    "group_norm_silu",
    "merge_columns",
    "source_hash",
]

tag_caches()
