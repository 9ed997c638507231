"""Nearest-neighbour upsampling and the 3x3 convolution after it, forward and backward: as two, or in ways as one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suite import Against, Comparison, Size
from bench.timing import Workload, rotations
from kernels.upsample_conv import padded_sums, reference, upsample_conv

TWO, OURS, TRANSPOSED = "nearest, then 3x3", "ours, 2x2", "transposed 4x4"


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Forward too by a transposed convolution: no copy interleaves pixels, but its kernels may multiply zeros."""
    kernel = padded_sums(weight).flip(2, 3).transpose(0, 1).to(weight.dtype)
    return F.conv_transpose2d(x, kernel.contiguous(memory_format=torch.channels_last), stride=2, padding=1)


def _comparison(size: Size, n: int, channels: int, side: int) -> Comparison:
    functions = {TWO: reference, OURS: upsample_conv, TRANSPOSED: transposed}

    def image(*shape: int) -> Tensor:
        v = torch.randn(shape, device=size.device, dtype=size.dtype)
        return v.contiguous(memory_format=torch.channels_last)

    def work(fn: Callable[[Tensor, Tensor], Tensor]) -> Workload:
        run = torch.compile(fn, dynamic=False)
        weight = image(channels, channels, 3, 3).requires_grad_()
        moved = weight.element_size() * n * channels * (2 * side) ** 2
        sets = [
            (image(n, channels, side, side).requires_grad_(), image(n, channels, 2 * side, 2 * side))
            for _ in range(rotations(moved, size.device))
        ]

        def both(i: int) -> None:
            x, gradient = sets[i % len(sets)]
            torch.autograd.grad(run(x, weight), (x, weight), gradient)

        return Workload(both, images=n)

    ratios = {name: (Against(TWO, "higher"),) for name in (OURS, TRANSPOSED)}
    return Comparison(
        "upsampling", f"{n}x{channels}x{side}x{side}, forward and backward", tuple(functions),
        lambda: {name: work(fn) for name, fn in functions.items()}, ratios, queued=True,
    )  # fmt: skip


def comparisons(size: Size) -> list[Comparison]:
    """Where the network upsamples to its full resolution, which most of the time goes to."""
    net, (n, *_) = size.config.net, size.norms[0]
    return [
        _comparison(size, n, net.channels * net.channel_mult[min(1, len(net.channel_mult) - 1)], net.image_size // 2)
    ]


def test_upsampling(record):
    record()
