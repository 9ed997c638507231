"""Layers that networks share. Images are (N, C, H, W) in channels_last memory throughout."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nets.dropout import Dropout

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


def zeroed(layer: Layer) -> Layer:
    """Set weight and bias to zero, so that the residual branch that ends in this layer starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv, + embedding, GroupNorm-SiLU-Dropout-Conv, + shortcut (Ho et al. 2020, appendix B).

    Args:
        c_in, c_out: channels before and after; a 1x1 convolution is the shortcut where they differ.
        c_embedding: width of the embedding of time and conditions; 0: none, as in the autoencoder.
        dropout: probability, in [0, 1).
        adaptive: the embedding gives the second norm's scale and offset instead (AdaGN; Dhariwal and Nichol 2021).
    """

    def __init__(
        self, c_in: int, c_out: int, c_embedding: int = 0, *,
        groups: int, eps: float, dropout: float = 0.0, adaptive: bool = False,
    ) -> None:  # fmt: skip
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
    """Single-head self-attention over the H * W positions, with a residual: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.cross: nn.Module | None = None  # attention to a text may follow

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
