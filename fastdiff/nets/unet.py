"""The U-Net of DDPM (Ho et al. 2020, appendix B): `model(x_t, t, **conditions) -> (N, C, H, W)`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.model_sections import UNetConfig
from fastdiff.nets.conditions import CrossAttention, LabelEmbedding, PooledText, TimeEmbedding
from fastdiff.nets.dropout import tag_dropouts
from fastdiff.nets.layers import Downsample, NoAttention, ResidualBlock, SelfAttention, Upsample, zeroed
from fastdiff.nets.text import READERS, TextEncoder

Text = tuple[Tensor | None, Tensor | None]  # tokens and mask


class DownStage(nn.Module):
    """One level on the way down: residual blocks, each with attention after it, then a downsampling or None."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.downsample = nn.ModuleList(blocks), nn.ModuleList(attention), downsample

    def forward(self, h: Tensor, embedding: Tensor, seed: Tensor | None, skips: list[Tensor], text: Text) -> Tensor:
        """Appends every activation that the way up needs to `skips`."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding, seed), *text)
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            skips.append(h)
        return h


class UpStage(nn.Module):
    """One level on the way up: residual blocks, each fed one skip connection, then an upsampling or None."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.upsample = nn.ModuleList(blocks), nn.ModuleList(attention), upsample

    def forward(self, h: Tensor, embedding: Tensor, seed: Tensor | None, skips: list[Tensor], text: Text) -> Tensor:
        """Takes one activation from the end of `skips` for each block."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], 1), embedding, seed), *text)
        return h if self.upsample is None else self.upsample(h)


class UNet(nn.Module):
    """A residual U-Net with time embedding and self-attention at chosen resolutions.

    It is told how noisy its input is and, if the config says so, its class and a text: not what its output means, not
    the schedule, not the precision. Weights are made in channels_last memory.

    Args:
        config: the shape; `UNetConfig()` is google/ddpm-cifar10-32.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        groups, eps, dropout = config.norm_groups, config.norm_eps, config.dropout
        text_width = 0 if config.text_encoder == "none" else config.text_width
        widths = [config.channels * m for m in config.channel_mult]

        def block(c_in: int, c_out: int) -> nn.Module:
            shape = c_in, c_out, 4 * config.channels
            return ResidualBlock(*shape, groups=groups, eps=eps, dropout=dropout, adaptive=config.norm_conditioning)

        def attention(channels: int, level: int) -> nn.Module:
            if config.resolutions[level] not in config.attention_resolutions:
                return NoAttention()
            layer = SelfAttention(channels, groups=groups, eps=eps)
            if text_width:  # only now: a seed gives each layer its weights in the order in which they are made
                layer.cross = CrossAttention(channels, text_width, heads=4, groups=groups, eps=eps)
            return layer

        _, ids = READERS.get(config.text_encoder, (None, 0))
        self.text = TextEncoder(ids, text_width, config.text_blocks) if ids else None
        self.time = TimeEmbedding(config.channels)
        self.span = TimeEmbedding(config.channels, without_effect=True) if config.two_times else None
        self.pooled = PooledText(text_width, 4 * config.channels) if text_width and config.text_pooled else None
        self.label = LabelEmbedding(config.num_classes, 4 * config.channels) if config.num_classes else None
        side = config.patch
        # 3x3 positions of side x side pixels: a 3x3 convolution where side is 1.
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3 * side, stride=side, padding=side)

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

        self.norm_out = nn.GroupNorm(groups, c, eps)
        self.conv_out = zeroed(nn.Conv2d(c, config.image_channels * side**2, 3, padding=1))
        self.to(memory_format=torch.channels_last)
        tag_dropouts(self)

    def forward(
        self, x: Tensor, t: Tensor, dropout_seed: Tensor | None = None, *, labels: Tensor | None = None,
        text: Tensor | None = None, text_mask: Tensor | None = None, span: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict from noised images.

        Args:
            x: (N, C, H, W), in channels_last memory for speed.
            t: (N,) noise levels, about 0..1000 (a schedule's `c_noise`).
            dropout_seed: (1,) int64 that fixes the dropout masks; None for masks from PyTorch's own generator.
            labels: (N,) int64 in 0..num_classes, of which the last means no class; only if the network has classes.
            text: (N, L) int64, bytes or words as by `READERS`, or, of a frozen encoder, tokens (N, L, text_width) with
                text_mask (N, L) bool, which of them count, at least one in each row; only if the network reads texts.
            span: (N,) t - r, how far its output leads, 0 or more, in units of t; only if the network has two times.

        Returns:
            (N, C, H, W), in the dtype of the weights or of autocast.
        """
        if self.text is not None:
            text, text_mask = self.text(text)
        embedding, tokens = self.time(t), (text, text_mask)
        if self.span is not None:
            embedding = embedding + self.span(span)
        if self.label is not None:
            embedding = embedding + self.label(labels)
        if self.pooled is not None:
            embedding = embedding + self.pooled(*tokens)
        embedding = F.silu(embedding)
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding, dropout_seed, skips, tokens)
        h = self.middle_1(h, embedding, dropout_seed)
        h = self.middle_attention(h)
        h = self.middle_2(h, embedding, dropout_seed)
        for stage in self.up:
            h = stage(h, embedding, dropout_seed, skips, tokens)
        h = self.conv_out(F.silu(self.norm_out(h)))
        if self.config.patch == 1:
            return h
        return F.pixel_shuffle(h, self.config.patch).contiguous(memory_format=torch.channels_last)
