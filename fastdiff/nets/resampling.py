"""Layers of the U-Net between two resolutions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdiff.nets.layers import Conv2d, Pending, Shared, Vector, left_out, whole


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    number: int  # its place in `Shared`

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def vectors(self) -> Sequence[Vector]:
        """See `Part`."""
        return left_out(self.conv)

    def forward(self, x: Tensor, shared: Shared) -> Pending:
        """x: (N, C, H, W), one tensor, as it is a skip connection too. Padded on the right and at the bottom only, as
        TensorFlow's SAME padding did in DDPM's code."""
        return Pending(self.conv(F.pad(x, (0, 1, 0, 1))), None, *shared.vectors[self.number])


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    number: int  # its place in `Shared`

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def vectors(self) -> Sequence[Vector]:
        """See `Part`."""
        return left_out(self.conv)

    def forward(self, x: Pending, shared: Shared) -> Pending:
        """x: (N, C, H, W)."""
        total = whole(x)
        fused = self.conv.leaves_bias
        h = upsampling_conv(total, self.conv.weight) if fused else self.conv(upsample_nearest(total))
        return Pending(h, None, *shared.vectors[self.number])


class _NearestUpsampling(torch.autograd.Function):
    """See `upsample_nearest`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # ty: ignore[incompatible-method-override]
        g = gradient
        return g[..., ::2, ::2] + g[..., ::2, 1::2] + g[..., 1::2, ::2] + g[..., 1::2, 1::2]


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat each pixel in a square of 2 by 2: (N, C, H, W) -> (N, C, 2 H, 2 W).

    The gradient is the plain sum of the four, which torch.compile makes one pass of; for that of F.interpolate it adds
    to zeros, atomically.
    """
    return _NearestUpsampling.apply(x)


def upsampling_conv(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(upsample_nearest(x), weight, padding=1)` with about half of its products.

    Of the 3 x 3 pixels that an output pixel is made of, some are copies of one pixel of x, so that their weights can be
    added first: 2 x 2 remain, others for each of the four places (even or odd row, even or odd column) in the output.

    Args:
        x: (N, C, H, W), in channels_last memory.
        weight: (C_out, C, 3, 3). Sums of weights are formed in float32 or better, then rounded to its dtype.

    Returns:
        (N, C_out, 2 H, 2 W), in channels_last memory and in the dtype of F.conv2d's result, autocast or not. It can be
        differentiated once.
    """
    return _UpsamplingConv.apply(x, weight)


class _UpsamplingConv(torch.autograd.Function):
    """See `upsampling_conv`. Forward: a 2x2 convolution, with channels of their own for each place. Backward: that of
    the same as a transposed 4x4 convolution of stride 2, which takes the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        c_out, c_in = weight.shape[:2]
        # With weights a, b, c along an axis, pixels at even places are a x[i - 1] + (b + c) x[i], and at odd ones
        # (a + b) x[i] + c x[i + 1]: every second of the sums of neighbours in 0, a, b, c, 0.
        sums = padded_sums(weight).view(c_out, c_in, 2, 2, 2, 2)  # tap, place, tap, place
        kernel = sums.permute(3, 5, 0, 1, 2, 4).reshape(4 * c_out, c_in, 2, 2).to(weight.dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernel, padding=1)
        ctx.save_for_backward(x.to(y.dtype), kernel.to(y.dtype))
        ctx.dtype = weight.dtype
        return _interleaved(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        c_out, c_in = kernel.shape[0] // 4, kernel.shape[1]
        sums = kernel.view(2, 2, c_out, c_in, 2, 2).permute(3, 2, 4, 0, 5, 1).reshape(c_in, c_out, 4, 4)
        dx, dkernel, _ = torch.ops.aten.convolution_backward(
            gradient.contiguous(memory_format=torch.channels_last), x,
            sums.flip(2, 3).contiguous(memory_format=torch.channels_last), None,
            [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [*ctx.needs_input_grad, False],
        )  # fmt: skip
        if dkernel is None:
            return dx, None
        dweight = _neighbours(_wide(dkernel).transpose(0, 1).flip(2, 3)).to(ctx.dtype)
        return dx, dweight.contiguous(memory_format=torch.channels_last)


def padded_sums(weight: Tensor) -> Tensor:
    """(C_out, C, 3, 3) -> (C_out, C, 4, 4): sums of 2 x 2 neighbours, with zeros around, in float32 or better."""
    return _neighbours(F.pad(_wide(weight), (1, 1, 1, 1)))


def _wide(v: Tensor) -> Tensor:
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _neighbours(v: Tensor) -> Tensor:
    """(..., k, k) -> (..., k - 1, k - 1): sums of 2 x 2 neighbours."""
    rows = v[..., :-1, :] + v[..., 1:, :]
    return rows[..., :-1] + rows[..., 1:]


def _interleaved(y: Tensor) -> Tensor:
    """The 2 x 2 places, each C channels of (N, 4 C, H + 1, W + 1), as pixels of (N, C, 2 H, 2 W).

    Row h of even places is y's row h, and of odd ones row h + 1; so for columns.
    """
    n, channels, height, width = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    windows = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, channels)).unfold(1, 2, 1).unfold(2, 2, 1)
    # (N, H, W, place, place, C, row, column) -> (N, H, W, C, place, place): place 0 takes row 0, and 1 takes 1.
    pixels = windows.diagonal(0, 3, 6).diagonal(0, 3, 5).permute(0, 1, 4, 2, 5, 3)
    return pixels.reshape(n, 2 * height, 2 * width, channels).contiguous().permute(0, 3, 1, 2)
