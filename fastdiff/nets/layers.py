"""Layers that networks share. Images are (N, C, H, W) in channels_last memory throughout."""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff._kernels import dropout_factor_torch

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


def zeroed(layer: Layer) -> Layer:
    """Set weight and bias to zero, so that the residual branch that ends in this layer starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class TimeEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (N,) -> (N, 4 * channels) (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,), about 0..1000, of any dtype; the MLP computes in the dtype of its weights."""
        half = self.channels // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # Frequencies from 1 down to 1 / 10000; the divisor half - 1 is DDPM's.
        frequency = torch.exp(index * (-math.log(10000.0) / max(half - 1, 1)))
        angle = t.to(torch.float32)[:, None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class LabelEmbedding(nn.Embedding):
    """A vector for each class, and one for no class, its last: (N,) int64 in 0..num_classes -> (N, width).

    All are zero at the start, so that a network without classes can go on with them.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)
        nn.init.zeros_(self.weight)


class PooledText(nn.Module):
    """The mean of a text's tokens, mapped to the embedding's width; zero at the start."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear = zeroed(nn.Linear(text_width, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (N, L, text_width) and a mask (N, L), at least one true a row -> (N, width)."""
        kept = mask[..., None].to(tokens.dtype)
        return self.linear((tokens * kept).sum(1) / kept.sum(1))


class Dropout(nn.Module):
    """Dropout whose mask can be fixed by a seed: a pure function of seed, stream and position (kernels/philox.py).

    Args:
        p: probability that an element is set to 0, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.stream = p, 0  # the stream sets a network's layers apart, see `tag_dropouts`

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); seed: (1,) int64, or None for a mask from PyTorch's own generator."""
        if not self.training or self.p == 0:
            return x
        if seed is None:
            return F.dropout(x, self.p)
        return x * dropout_factor_torch(seed, x.shape, self.stream, self.p).to(x.dtype)


def tag_dropouts(net: nn.Module) -> None:
    """Give each Dropout of a network a stream of its own."""
    for i, layer in enumerate(m for m in net.modules() if isinstance(m, Dropout)):
        layer.stream = i


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv, + embedding, GroupNorm-SiLU-Dropout-Conv, + shortcut (Ho et al. 2020, appendix B).

    Args:
        c_in, c_out: channels before and after; a 1x1 convolution is the shortcut where they differ.
        c_embedding: width of the embedding of time and conditions; 0: the block has none.
        dropout: probability, in [0, 1).
        adaptive: the embedding gives the second norm's scale and offset instead (AdaGN; Dhariwal and Nichol 2021).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_embedding: int = 0,
        *,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.norm_1 = nn.GroupNorm(groups, c_in, eps)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embedding = nn.Linear(c_embedding, 2 * c_out if adaptive else c_out) if c_embedding else None
        self.norm_2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None, dropout_seed: Tensor | None = None) -> Tensor:
        """x (N, c_in, H, W), embedding (N, c_embedding) -> (N, c_out, H, W)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        if self.embedding is None:
            h = self.norm_2(h)
        elif self.adaptive:
            scale, offset = self.embedding(embedding).chunk(2, 1)
            h = self.norm_2(h) * (1 + scale[:, :, None, None]) + offset[:, :, None, None]
        else:
            h = self.norm_2(h + self.embedding(embedding)[:, :, None, None])
        h = self.conv_2(self.dropout(F.silu(h), dropout_seed))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """Single-head self-attention over the H * W positions, with a residual: (N, C, H, W) -> (N, C, H, W).

    Args:
        text_width: of tokens that the positions then attend to; 0: none.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, text_width: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.cross = CrossAttention(channels, text_width, heads=4, groups=groups, eps=eps) if text_width else None

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """In channels_last memory every change of shape is a view."""
        h = self.norm(x)
        height_width = h.shape[2:]
        h = h.flatten(2).transpose(1, 2).unsqueeze(1)  # (N, 1, H W, C): one head
        q, k, v = self.qkv(h).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = x + h.transpose(1, 2).unflatten(2, height_width)
        return x if self.cross is None else self.cross(x, text, mask)


class NoAttention(nn.Identity):
    """In the place of an attention."""

    def forward(self, input: Tensor, *text: Tensor | None) -> Tensor:
        return input


class CrossAttention(nn.Module):
    """Attention of image positions to the tokens of a text, with a residual; without effect at the start.

    Args:
        channels: of the image; a multiple of `heads` and `groups`.
        text_width: of the tokens.
    """

    def __init__(self, channels: int, text_width: int, *, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.norm_text = nn.LayerNorm(text_width)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(text_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (N, C, H, W), tokens (N, L, text_width), mask (N, L), at least one true a row -> (N, C, H, W)."""
        k, v = self.kv(self.norm_text(tokens)).chunk(2, -1)
        k, v = split_heads(k, self.heads), split_heads(v, self.heads)
        h = self.norm(x)
        height_width = h.shape[2:]
        q = split_heads(self.q(h.flatten(2).transpose(1, 2)), self.heads)
        h = self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, mask[:, None, None])))
        return x + h.transpose(1, 2).unflatten(2, height_width)


def split_heads(h: Tensor, heads: int) -> Tensor:
    """(N, L, D) -> (N, heads, L, D / heads)."""
    return h.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(h: Tensor) -> Tensor:
    """(N, heads, L, D / heads) -> (N, L, D)."""
    return h.transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

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
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
