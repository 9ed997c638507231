"""A convolution whose backward computes the two gradients side by side on a GPU.

    y = conv2d(x, weight, bias)
    dx = conv_transpose(dy, weight), and beside it dweight = correlate(x, dy) and dbias = sum(dy)

Small convolutions leave part of a GPU idle. Neither gradient needs the other, so the weight's runs on a second stream,
which the operator joins before it returns; a captured step gets two branches. Elsewhere one runs after the other. The
library computes both: no kernel of ours, and the bits of the plain convolution.

Not timed on a GPU yet; `fork_convolutions` in levers.py makes a network use it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@torch.library.custom_op("fastdiff::forked_conv_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
              bias: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dweight and dbias, which is empty without `bias`; in channels_last memory, as all arguments."""

    def gradients(*mask: bool) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, weight.shape[:1] if bias else None, stride, padding, [1, 1], False, [0, 0], 1, mask
        )

    if dy.device.type != "cuda":
        dx, (_, dweight, dbias) = gradients(True, False, False)[0], gradients(False, True, bias)
    else:
        # The second stream's memory needs no record_stream: whatever it does waits for all that is queued on the first.
        main, side = torch.cuda.current_stream(dy.device), _side(dy.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            _, dweight, dbias = gradients(False, True, bias)
        dx = gradients(True, False, False)[0]
        main.wait_stream(side)
    return dx, dweight, dbias if bias else dy.new_empty(0)


@_backward.register_fake
def _(dy, x, weight, stride, padding, bias):
    return torch.empty_like(x), torch.empty_like(weight), dy.new_empty(weight.shape[0] if bias else 0)


class _ForkedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
    ) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding)
        ctx.save_for_backward(*(v.to(y.dtype, memory_format=torch.channels_last) for v in (x, weight)))
        ctx.dtypes = [None if v is None else v.dtype for v in (x, weight, bias)]
        ctx.geometry = stride, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (stride, padding), needed = ctx.geometry, ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if needed[0] and needed[1]:
            each = _backward(gradient, x, weight, stride, padding, needed[2])
        else:  # nothing to run side by side
            sizes = weight.shape[:1] if needed[2] else None
            each = torch.ops.aten.convolution_backward(
                gradient, x, weight, sizes, stride, padding, [1, 1], False, [0, 0], 1, needed
            )
        wanted = zip(each, ctx.dtypes, needed, strict=True)
        return *(g.to(dtype) if need else None for g, dtype, need in wanted), None, None


def forked_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = (1, 1),
                padding: Pair = (0, 0)) -> Tensor:  # fmt: skip
    """F.conv2d with dilation 1 and one group: (N, C, H, W) -> (N, C_out, H', W'). Differentiable once.

    x       (N, C, H, W), in channels_last memory
    weight  (C_out, C, kh, kw)
    bias    (C_out,) or None
    """
    return _ForkedConv.apply(x, weight, bias, list(stride), list(padding))
