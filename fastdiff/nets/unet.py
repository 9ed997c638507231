"""The U-Net of DDPM (Ho et al. 2020, appendix B): `model(x_t, t) -> (N, C, H, W)`."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import UNetConfig
from fastdiff.nets.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    Pending,
    ResidualBlock,
    SelfAttention,
    Shared,
    TimeEmbedding,
    Vector,
    add_norm_silu,
    added,
    as_rows,
    left_out,
    time_shifts,
    whole,
    zeroed,
)
from fastdiff.nets.resampling import Downsample, Upsample

__all__ = ["UNet", "UNetConfig"]


class DownStage(nn.Module):
    """One level on the way down: residual blocks, each with attention or nothing after it, then a downsampling.

    Args:
        blocks: residual blocks.
        attention: one module for each block, an identity where there is none.
        downsample: None on the last level.
    """

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.downsample = nn.ModuleList(blocks), nn.ModuleList(attention), downsample

    def forward(self, h: Pending, shared: Shared, skips: list[Tensor]) -> Pending:
        """Appends what each block and the downsampling were given to `skips`, for the way up."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h, kept = block(h, shared)
            skips.append(kept)
            if isinstance(attention, SelfAttention):
                h = attention(h, shared)
        if self.downsample is not None:
            skips.append(whole(h))
            h = self.downsample(skips[-1], shared)
        return h


class UpStage(nn.Module):
    """One level on the way up: residual blocks, each fed one skip connection, then an upsampling (None on the last)."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], upsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.attention, self.upsample = nn.ModuleList(blocks), nn.ModuleList(attention), upsample

    def forward(self, h: Pending, shared: Shared, skips: list[Tensor]) -> Pending:
        """Takes one activation from the end of `skips` for each block."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h, _ = block(h, shared, skips.pop())
            if isinstance(attention, SelfAttention):
                h = attention(h, shared)
        return h if self.upsample is None else self.upsample(h, shared)


class UNet(nn.Module):
    """A residual U-Net with time embedding and self-attention at chosen resolutions.

    It is told how noisy its input is and nothing else: not what its output means, not the schedule, not the precision.
    Weights are made in channels_last memory.

    Args:
        config: the shape; `UNetConfig()` is google/ddpm-cifar10-32.
    """

    number = 0  # of the parts, which are numbered from 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        groups, eps, dropout = config.norm_groups, config.norm_eps, config.dropout
        widths = [config.channels * m for m in config.channel_mult]
        c_embedding = 4 * config.channels

        def block(c_in: int, c_out: int) -> nn.Module:
            return ResidualBlock(c_in, c_out, c_embedding, groups=groups, eps=eps, dropout=dropout)

        def attention(channels: int, level: int) -> nn.Module:
            if config.image_size // 2**level in config.attention_resolutions:
                return SelfAttention(channels, groups=groups, eps=eps)
            return nn.Identity()

        self.time = TimeEmbedding(config.channels)
        self.conv_in = Conv2d(config.image_channels, config.channels, 3, padding=1)

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
        self.use_kernels("torch")

    @property
    def parts(self) -> list[ResidualBlock | SelfAttention | Downsample | Upsample]:
        """Each `Part`, in the order of registration: a stage's blocks, then its attentions, then its resampling."""
        return [m for m in self.modules() if isinstance(m, ResidualBlock | SelfAttention | Downsample | Upsample)]

    def use_kernels(self, kind: str) -> "UNet":
        """Run the norms by PyTorch (`torch`) or by the fused Triton kernels (`triton`; on a CPU by their references).

        With `triton`, norms also add the biases, residuals and skip connections before them, so that convolutions leave
        their biases out, all projections of the time embedding are one product, and an upsampling is one with its
        convolution: hooks on those layers see no bias, or are not called. Weights, their names and the result up to
        rounding stay the same; dropout draws other masks. Call it again after exchanging parts of the network. Returns
        the network itself.
        """
        fused = {"triton": True, "torch": False}[kind]
        for number, part in enumerate(self.parts, 1):
            part.number = number
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.fused = fused
            elif isinstance(module, Conv2d | Linear):
                module.leaves_bias = fused
        # Attention stands after all blocks of a level or after none, so the last one registered is the last called.
        for part, after in itertools.pairwise(self.parts):
            if isinstance(after, Downsample | Upsample) and isinstance(part, ResidualBlock | SelfAttention):
                part.keep_bias()
        return self

    def vectors(self) -> Sequence[Vector]:
        """See `Part`: of the last norm, and the bias that the first convolution leaves to the first one."""
        return [self.norm_out.weight, self.norm_out.bias, *left_out(self.conv_in)]

    def _shared(self, t: Tensor, n: int) -> Shared:
        embedding = F.silu(self.time(t))
        seed, parts = None, self.parts
        vectors = added([self.vectors(), *(part.vectors() for part in parts)])
        if not self.norm_out.fused:
            return Shared(embedding, vectors)
        if torch.is_grad_enabled():
            vectors = as_rows(vectors, n)
        if self.training and self.config.dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), device=t.device)  # one for all masks, so one small kernel
        shifts = time_shifts([part for part in parts if isinstance(part, ResidualBlock)], embedding)
        return Shared(embedding, vectors, shifts, seed)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict from noised images.

        Args:
            x: (N, C, H, W), in channels_last memory for speed.
            t: (N,) noise levels, about 0..1000 (a schedule's `c_noise`).

        Returns:
            (N, C, H, W), in the dtype of the weights or of autocast.
        """
        shared = self._shared(t, len(x))
        weight, bias, *in_bias = shared.vectors[self.number]
        h = Pending(self.conv_in(x), None, *in_bias)
        skips: list[Tensor] = []
        for stage in self.down:
            h = stage(h, shared, skips)
        h, kept = self.middle_1(h, shared)
        skips.append(kept)
        h, _ = self.middle_2(self.middle_attention(h, shared), shared)
        for stage in self.up:
            h = stage(h, shared, skips)
        h, *_ = add_norm_silu(h, self.norm_out, weight, bias)
        return self.conv_out(h)
