"""Fused Triton kernels: GroupNorm + SiLU, the EMA update, and Adam + EMA in one pass."""

from kernels.adam_ema import adam_ema_
from kernels.add_group_norm_silu import add_group_norm_silu
from kernels.ema import ema_update_
from kernels.group_norm_silu import group_norm_silu
from kernels.registry import REGISTRY

__all__ = ["REGISTRY", "adam_ema_", "add_group_norm_silu", "ema_update_", "group_norm_silu"]
