"""Fused Triton kernels: GroupNorm + SiLU (of sums too), the EMA update, Adam + EMA in one pass, merged gradients.

On CUDA tensors they run Triton, and raise if that fails; on CPU tensors PyTorch, or Triton's interpreter under
TRITON_INTERPRET=1.
"""

from .adam_ema import adam_ema_
from .add_group_norm_silu import add_group_norm_silu
from .caching import source_hash, tag_caches
from .ema import ema_update_
from .group_norm_silu import group_norm_silu
from .language import TRITON_INSTALLED
from .merge_columns import linear_qkv, merge_columns
from .philox import dropout_factor_torch
from .registry import REGISTRY
from .spec import KernelSpec
from .upsample_conv import upsample_conv

__all__ = [
    "REGISTRY",
    "TRITON_INSTALLED",
    "KernelSpec",
    "adam_ema_",
    "add_group_norm_silu",
    "dropout_factor_torch",
    "ema_update_",
    "group_norm_silu",
    "linear_qkv",
    "merge_columns",
    "source_hash",
    "upsample_conv",
]

tag_caches()
