"""Nearest-neighbour upsampling and the 3x3 convolution after it, as one, with 4/9 of the products.

    y = conv3x3(repeat each pixel of x in a square of 2 x 2) + bias

Of the 3 x 3 pixels that an output pixel is made of, some are copies of one pixel of x, so their weights can be added
first. Along one axis, with weights a, b, c: pixels at even places are a x[i - 1] + (b + c) x[i], and at odd ones
(a + b) x[i] + c x[i + 1]. So 2 x 2 products remain, with other weights at each of the four places (even or odd row,
even or odd column). Forward: a 2x2 convolution with channels of their own for each place, and one strided copy.
Backward: the gradient of the same map as a transposed 4x4 convolution of stride 2, which takes dy as it comes.

No kernel of ours: library convolutions do the products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .spec import Case, Inputs, KernelSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The two layers in plain PyTorch."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of x, upsampled: (N, C, H, W) -> (N, C_out, 2 H, 2 W). Differentiable once.

    x       (N, C, H, W), in channels_last memory
    weight  (C_out, C, 3, 3); sums of weights are formed in float32 or better, then rounded to its dtype
    bias    (C_out,) or None

    The result is in channels_last memory and in the dtype of F.conv2d's result, under autocast too.
    """
    y = _UpsampleConv.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        c_out, c_in = weight.shape[:2]
        # Every second of the sums of neighbours in 0, a, b, c, 0 belongs to the same place.
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


def _case(name: str, n: int, c: int, height: int, width: int, c_out: int, *, bias: bool = True) -> Case:
    """Values exact in bf16, so that only arithmetic is compared."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        x = torch.randn(n, c, height, width, generator=generator).bfloat16()
        weight = (torch.randn(c_out, c, 3, 3, generator=generator) / c**0.5).bfloat16()
        inputs: Inputs = {"x": x, "weight": weight}
        inputs = {key: v.to(dtype, memory_format=torch.channels_last) for key, v in inputs.items()}
        return inputs | ({"bias": torch.randn(c_out, generator=generator).bfloat16().to(dtype)} if bias else {})

    return Case(name, make)


def _min_bytes(inputs: Inputs) -> tuple[int, int]:
    """x and the weights in, y out; dy and x in, dx out, the weights in and their gradient out."""
    x, weight = inputs["x"], inputs["weight"]
    y = 4 * x.nbytes // x.shape[1] * weight.shape[0]
    return x.nbytes + weight.nbytes + y, 2 * x.nbytes + y + 2 * weight.nbytes


SPEC = KernelSpec(
    name="upsample_conv",
    op=upsample_conv,
    reference=reference,
    cases=(
        _case("8 channels", 2, 8, 5, 4, 8),
        _case("everything at once", 3, 16, 8, 8, 4),
        _case("one pixel", 1, 3, 1, 1, 5, bias=False),
        _case("one channel, two rows", 1, 1, 2, 7, 1),
    ),
    dtypes=(torch.float32, torch.bfloat16),
    min_bytes=_min_bytes,
    category="conv",
    differentiable=("x", "weight", "bias"),
)
