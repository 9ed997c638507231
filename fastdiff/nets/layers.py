"""Layers of the U-Net. Activations are (N, C, H, W) in channels_last memory throughout."""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class GroupNorm(nn.GroupNorm):
    """Parameters of a norm that `group_norm_silu` applies; `fused` chooses the Triton kernel."""

    fused = False


def group_norm_silu(
    x: Tensor,
    norm: GroupNorm,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """GroupNorm of x + shift, SiLU unless `silu` is false, dropout: (N, C, H, W) -> (N, C, H, W), in the dtype of x.

    Every norm of the network comes through here, so that one line chooses its implementation. Statistics are float32
    under autocast too.

    Args:
        x: (N, C, H, W), in channels_last memory.
        norm: weight, bias, groups and eps.
        shift: (N, C), added to every pixel first.
        dropout_p: probability that an element is set to 0, in [0, 1).
        seed, stream: fix the fused kernel's dropout mask: (1,) int64, needed for dropout_p > 0, and one number for each
            layer that shares the seed. PyTorch draws from its own generator instead.
    """
    if norm.fused:
        return kernels.group_norm_silu(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift,
            activation="silu" if silu else "none", dropout_p=dropout_p, seed=seed, stream=stream,
        )  # fmt: skip
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.dropout((F.silu(y) if silu else y).to(x.dtype), dropout_p)


class _Concatenation(torch.autograd.Function):
    """See `concatenate`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, skip: Tensor) -> Tensor:
        ctx.channels = [h.shape[1], skip.shape[1]]
        return torch.cat([h, skip], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # ty: ignore[incompatible-method-override]
        return tuple(g.contiguous(memory_format=torch.channels_last) for g in gradient.split(ctx.channels, 1))


def concatenate(h: Tensor, skip: Tensor) -> Tensor:
    """Along the channels: (N, C1, H, W), (N, C2, H, W) -> (N, C1 + C2, H, W).

    The gradients are tensors of their own. Autograd's would be slices of one, which every convolution that gets them
    copies twice: for the gradients of its input and of its weight.
    """
    return _Concatenation.apply(h, skip)


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


def zeroed(layer: Layer) -> Layer:
    """Set weight and bias of a layer to zero, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (N,) -> (N, 4 * channels) (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,), about 0..1000, of any dtype; computed in the dtype of the weights."""
        half = self.channels // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # Frequencies from 1 down to 1 / 10000; the divisor half - 1 is DDPM's.
        frequency = torch.exp(index * (-math.log(10000.0) / max(half - 1, 1)))
        angle = t.to(torch.float32)[:, None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv, + time embedding, GroupNorm-SiLU-Dropout-Conv, + shortcut (Ho et al. 2020, appendix B).

    Args:
        c_in, c_out: channels before and after; a 1x1 convolution is the shortcut where they differ.
        c_embedding: width of the time embedding.
        dropout: probability, in [0, 1).
        stream: sets the block's dropout masks apart from those of the others; one number for each.
    """

    def __init__(
        self, c_in: int, c_out: int, c_embedding: int, *, groups: int, eps: float, dropout: float, stream: int = 0
    ) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(groups, c_in, eps)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embedding = nn.Linear(c_embedding, c_out)
        self.norm_2 = GroupNorm(groups, c_out, eps)
        self.dropout, self.stream = dropout, stream
        self.conv_2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        """x: (N, c_in, H, W); embedding: (N, c_embedding), already through SiLU. Returns (N, c_out, H, W).

        seed: (1,) int64 of the fused kernel's dropout; see `group_norm_silu`.
        """
        h, shift = group_norm_silu(x, self.norm_1), self.embedding(embedding)
        if self.norm_2.fused:  # its kernel adds the convolution's bias too, which is then not a pass of its own
            h, shift = F.conv2d(h, self.conv_1.weight, padding=1), shift + self.conv_1.bias
        else:
            h = self.conv_1(h)
        dropout_p = self.dropout if self.training else 0.0
        h = group_norm_silu(h, self.norm_2, shift=shift, dropout_p=dropout_p, seed=seed, stream=self.stream)
        return self.shortcut(x) + self.conv_2(h)


class SelfAttention(nn.Module):
    """Single-head self-attention over the H * W positions, with a residual: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W); in channels_last memory the reshapes are views."""
        n, c, height, width = x.shape
        h = group_norm_silu(x, self.norm, silu=False).permute(0, 2, 3, 1).reshape(n, 1, height * width, c)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + h.reshape(n, height, width, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Padded on the right and at the bottom only, as TensorFlow's SAME padding did in DDPM's code."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        return self.conv(upsample_nearest(x))
