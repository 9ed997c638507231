"""Pixels as they are stored, 0..255, and as networks see them, -1..1: the one place of rounding."""

import torch
from torch import Tensor


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; a view of the same memory order, so channels_last."""
    return (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5


def to_uint8(x: Tensor) -> Tensor:
    """Floating point in [-1, 1], clamped -> uint8 of the same shape and memory format.

    Rounded, not truncated, which would darken every pixel by half a level.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point images in [-1, 1], got {x.dtype}")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
