"""The U-Net of DDPM (Ho et al. 2020, appendix B): `model(x_t, t) -> (N, C, H, W)`."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import UNetConfig
from fastdiff.nets.layers import (
    Downsample,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    concatenate,
    group_norm_silu,
    zeroed,
)

__all__ = ["UNet", "UNetConfig"]


class DownStage(nn.Module):
    """One level on the way down: residual blocks, each with attention or nothing after it, then a downsampling.

    Args:
        blocks: residual blocks.
        attention: one module for each block.
        downsample: None on the last level.
    """

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.downsample = nn.ModuleList(blocks), nn.ModuleList(attention), downsample

    def forward(self, h: Tensor, embedding: Tensor, seed: Tensor | None, skips: list[Tensor]) -> Tensor:
        """Appends every activation to `skips`, for the way up."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding, seed))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            skips.append(h)
        return h


class UpStage(nn.Module):
    """One level on the way up: residual blocks, each fed one skip connection, then an upsampling (None on the last)."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.upsample = nn.ModuleList(blocks), nn.ModuleList(attention), upsample

    def forward(self, h: Tensor, embedding: Tensor, seed: Tensor | None, skips: list[Tensor]) -> Tensor:
        """Takes one activation from the end of `skips` for each block."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(concatenate(h, skips.pop()), embedding, seed))
        return h if self.upsample is None else self.upsample(h)


class UNet(nn.Module):
    """A residual U-Net with time embedding and self-attention at chosen resolutions.

    It is told how noisy its input is and nothing else: not what its output means, not the schedule, not the precision.
    Weights are made in channels_last memory.

    Args:
        config: the shape; `UNetConfig()` is google/ddpm-cifar10-32.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        groups, eps, dropout = config.norm_groups, config.norm_eps, config.dropout
        widths = [config.channels * m for m in config.channel_mult]
        c_embedding = 4 * config.channels
        streams = itertools.count()

        def block(c_in: int, c_out: int) -> nn.Module:
            return ResidualBlock(
                c_in, c_out, c_embedding, groups=groups, eps=eps, dropout=dropout, stream=next(streams)
            )

        def attention(channels: int, level: int) -> nn.Module:
            if config.image_size // 2**level in config.attention_resolutions:
                return SelfAttention(channels, groups=groups, eps=eps)
            return nn.Identity()

        self.time = TimeEmbedding(config.channels)
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)

        c, skips = config.channels, [config.channels]  # channels now, and of every activation that is kept
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            ins = [c, *[width] * (config.blocks_per_level - 1)]
            downsample = Downsample(width) if level < len(widths) - 1 else None
            blocks = [block(c_in, width) for c_in in ins]
            self.down.append(DownStage(blocks, [attention(width, level) for _ in ins], downsample))
            skips += [width] * (len(ins) + (downsample is not None))
            c = width

        self.middle_1 = block(c, c)
        self.middle_attention = SelfAttention(c, groups=groups, eps=eps)
        self.middle_2 = block(c, c)

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            ins = [c, *[width] * config.blocks_per_level]
            blocks = [block(c_in + skips.pop(), width) for c_in in ins]
            upsample = Upsample(width) if level > 0 else None
            self.up.append(UpStage(blocks, [attention(width, level) for _ in ins], upsample))
            c = width

        self.norm_out = GroupNorm(groups, c, eps)
        self.conv_out = zeroed(nn.Conv2d(c, config.image_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def use_kernels(self, kind: str) -> "UNet":
        """Run the norms by the fused Triton kernel (`triton`; on a CPU its PyTorch reference) or by PyTorch (`torch`).

        Weights, their names and the result up to rounding stay the same; dropout draws other masks. Returns the network
        itself.
        """
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.fused = {"triton": True, "torch": False}[kind]
        return self

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict from noised images.

        Args:
            x: (N, C, H, W), in channels_last memory for speed.
            t: (N,) noise levels, about 0..1000 (a schedule's `c_noise`).

        Returns:
            (N, C, H, W), in the dtype of the weights or of autocast.
        """
        embedding = F.silu(self.time(t))
        seed = None
        if self.training and self.config.dropout > 0 and self.norm_out.fused:
            seed = torch.randint(2**63 - 1, (1,), device=x.device)  # one for all masks, so one small kernel
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding, seed, skips)
        h = self.middle_2(self.middle_attention(self.middle_1(h, embedding, seed)), embedding, seed)
        for stage in self.up:
            h = stage(h, embedding, seed, skips)
        return self.conv_out(group_norm_silu(h, self.norm_out))
