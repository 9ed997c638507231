"""How a network is told a noise level, a class and a text. Classes and texts begin without effect."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nets.layers import zeroed


class TimeEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (N,) -> (N, 4 * channels) (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, *, without_effect: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)
        if without_effect:  # at the start
            zeroed(self.linear_2)

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
