"""A variational autoencoder of the U-Net's parts, in the layout of diffusers' AutoencoderKL (Rombach et al. 2022)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.diffusion.reconstruction import mirror
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.layers import Downsample, ResidualBlock, SelfAttention, Upsample, zeroed

EPS = 1e-6  # of the norms
LOG_VAR = (-30.0, 20.0)  # the range of the latents' log variance


def middle(channels: int, groups: int) -> nn.Sequential:
    """A residual block, self-attention, a residual block."""
    block = ResidualBlock(channels, channels, groups=groups, eps=EPS)
    attention = SelfAttention(channels, groups=groups, eps=EPS)
    return nn.Sequential(block, attention, ResidualBlock(channels, channels, groups=groups, eps=EPS))


class Encoder(nn.Module):
    """Images (N, 3, H, W) -> means and log variances (N, 2 latent_channels, H / factor, W / factor)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, moments = config.widths, config.norm_groups, 2 * config.latent_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for c_in, width in pairwise((widths[0], *widths)):
            ins = [c_in, *[width] * (config.blocks - 1)]
            blocks = [ResidualBlock(c, width, groups=groups, eps=EPS) for c in ins]
            last = len(self.down) == len(widths) - 1
            self.down.append(nn.Sequential(*blocks, *([] if last else [Downsample(width)])))
        self.middle = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)
        self.conv_moments = nn.Conv2d(moments, moments, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_moments(self.conv_out(F.silu(self.norm_out(self.middle(h)))))


class Decoder(nn.Module):
    """Latents (N, latent_channels, H / factor, W / factor) -> images (N, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups
        self.conv_latents = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], groups)
        self.up = nn.ModuleList()
        for c_in, width in pairwise((widths[0], *widths)):
            ins = [c_in, *[width] * config.blocks]
            blocks = [ResidualBlock(c, width, groups=groups, eps=EPS) for c in ins]
            last = len(self.up) == len(widths) - 1
            self.up.append(nn.Sequential(*blocks, *([] if last else [Upsample(width)])))
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = zeroed(nn.Conv2d(widths[-1], 3, 3, padding=1))  # so all colours of grey images stay equal

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(self.conv_latents(z)))
        for level in self.up:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Critic(nn.Module):
    """A patch discriminator: images (N, 3, H, W) -> (N, 1, h, w), above 0 where they look real (Isola et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return self.conv_out(x)


class Autoencoder(nn.Module):
    """Images in [-1, 1] to Gaussian latents and back. Weights are made in channels_last memory.

    Its buffers `latent_mean` and `latent_std`, of each channel of the latents, are measured by evaluations; 0 before.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(name, torch.zeros(config.latent_channels))
        self.critic = Critic(config.base_channels) if config.critic_weight else None  # called beside `forward`
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, (N, latent_channels, H / factor, W / factor) each.

        Args:
            x: (N, 3, H, W) in [-1, 1]; H and W are multiples of the factor.
        """
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var.clamp(*LOG_VAR)

    def decode(self, z: Tensor) -> Tensor:
        """Images (N, 3, H, W), about in [-1, 1]."""
        return self.decoder(z)

    def forward(self, x: Tensor, noise: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What training compares: all that needs the network, in one call.

        Args:
            x: (N, 3, H, W) in [-1, 1].
            noise: shaped like the latents, standard normal.
            mirrored: (N, 2) bool, whether to flip left to right, and upside down; unused without equivariance.

        Returns:
            The images of the latents, mirrored; those of the latents halved in size, None without equivariance; the
            mean and the log variance of the latents.
        """
        mean, log_var = self.encode(x)
        z = mean + (0.5 * log_var).exp() * noise
        if not self.config.equivariance:
            return self.decode(z), None, mean, log_var
        z = mirror(z, mirrored)
        return self.decode(z), self.decode(F.avg_pool2d(z, 2)), mean, log_var
