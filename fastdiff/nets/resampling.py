"""Layers of the U-Net between two resolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nets.layers import Conv2d, Pending, Shared, Vector, left_out, own_vectors, whole


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    number: int  # its place in `Shared`

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def vectors(self) -> list[Vector]:
        """See `Part`."""
        return [*left_out(self.conv)]

    def forward(self, x: Tensor, shared: Shared) -> Pending:
        """x: (N, C, H, W), one tensor, as it is a skip connection too. Padded on the right and at the bottom only, as
        TensorFlow's SAME padding did in DDPM's code."""
        return Pending(self.conv(F.pad(x, (0, 1, 0, 1))), None, *own_vectors(self, shared))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    fused = False  # compute both as one
    number: int  # its place in `Shared`

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def vectors(self) -> list[Vector]:
        """See `Part`."""
        return [*left_out(self.conv)]

    def forward(self, x: Pending, shared: Shared) -> Pending:
        """x: (N, C, H, W)."""
        total = whole(x)
        h = upsampling_conv(total, self.conv.weight) if self.fused else self.conv(upsample_nearest(total))
        return Pending(h, None, *own_vectors(self, shared))


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
    """`F.conv2d(upsample_nearest(x), weight, padding=1)` with 4/9 of its products, forward and backward.

    Of the 3 x 3 pixels that an output pixel is made of, some are copies of one pixel of x, so that their weights can be
    added first: 2 x 2 remain, others for each of the four places (even or odd row, even or odd column) in the output.

    Args:
        x: (N, C, H, W), in channels_last memory.
        weight: (C_out, C, 3, 3). Under autocast both may be float32; sums of weights are formed in float32 or better.

    Returns:
        (N, C_out, 2 H, 2 W), in channels_last memory and in the dtype of F.conv2d's result.
    """
    return _UpsamplingConv.apply(x, weight)


class _UpsamplingConv(torch.autograd.Function):
    """See `upsampling_conv`. Forward: one 2x2 convolution, with channels of their own for each place. Backward: the
    4x4 convolution of stride 2 whose transpose that is, as it reads the gradient in its own order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        c_out, c_in = weight.shape[:2]
        # With weights a, b, c along an axis, pixels at even places are a x[i - 1] + (b + c) x[i], and at odd ones
        # (a + b) x[i] + c x[i + 1]: every second of the sums of neighbours in 0, a, b, c, 0.
        sums = _neighbours(F.pad(_wide(weight), (1, 1, 1, 1))).view(c_out, c_in, 2, 2, 2, 2)  # tap, place, tap, place
        kernel = sums.permute(3, 5, 0, 1, 2, 4).reshape(4 * c_out, c_in, 2, 2).to(weight.dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernel, padding=1)
        ctx.save_for_backward(x.to(y.dtype), kernel)
        return _interleaved(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # ty: ignore[incompatible-method-override]
        x, kernel = ctx.saved_tensors
        c_out, c_in, dtype = kernel.shape[0] // 4, kernel.shape[1], kernel.dtype
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums = kernel.view(2, 2, c_out, c_in, 2, 2).permute(3, 2, 4, 0, 5, 1).reshape(c_in, c_out, 4, 4)
        kernel = sums.flip(2, 3).to(gradient.dtype).contiguous(memory_format=torch.channels_last)
        dx = F.conv2d(gradient, kernel, stride=2, padding=1)
        _, dkernel, _ = torch.ops.aten.convolution_backward(
            x, gradient, kernel, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        dweight = _neighbours(_wide(dkernel).transpose(0, 1).flip(2, 3)).to(dtype)
        return dx, dweight.contiguous(memory_format=torch.channels_last)


def _wide(v: Tensor) -> Tensor:
    """Float32 or better."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _neighbours(v: Tensor) -> Tensor:
    """(..., k, k) -> (..., k - 1, k - 1): sums of 2 x 2 neighbours."""
    rows = v[..., :-1, :] + v[..., 1:, :]
    return rows[..., :-1] + rows[..., 1:]


def _interleaved(y: Tensor) -> Tensor:
    """The 2 x 2 places, each C channels of (N, 4 C, H + 1, W + 1), as pixels of (N, C, 2 H, 2 W)."""
    n, channels, height, width = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    places = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, channels))
    # An odd place's pixels are the one before and the one after, which an even place's successor has too.
    rows = [
        torch.stack([places[:, i : i + height, j : j + width, i, j] for j in range(2)], 3) for i in range(2)
    ]  # each (N, H, W, 2, C)
    return torch.stack(rows, 2).reshape(n, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
