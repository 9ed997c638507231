"""The sections of a config about latents: the autoencoder that makes them, and the network that works in them."""

import math
from dataclasses import dataclass
from typing import Literal

import tyro

from fastdiff.checks import at_least, check_words, positive, require


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and loss of an autoencoder, which `python -m fastdiff autoencoder` trains; factor 0: none."""

    factor: int = 0
    """How many times fewer pixels latents have in height and in width: 2, 4, 8 or 16."""
    latent_channels: int = 4
    """Channels of the latents."""
    base_channels: int = 64
    """Channels where the resolution is the images'; each halving doubles them, up to four times as many."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Distance of an image and its reconstruction: `l1`: absolute differences of pixels, at full, half and quarter
    resolution; `l2`: squared differences of pixels."""
    kl_weight: float = 1e-6
    """Weight of the latents' divergence from a standard normal, which is summed over an image's latents and divided by
    its 3 H W values, as Stable Diffusion's 1e-6 counts it."""
    equivariance: bool = True
    """Latents that are mirrored or halved in size must give the mirrored or halved image (EQ-VAE)."""
    critic_weight: float = 0.0
    """Weight of what a patch discriminator, trained beside the autoencoder, says of reconstructions; 0: none."""
    critic_start: int = 0
    """Training images (steps times batch size) before it is listened to; it learns from the first."""

    def __post_init__(self) -> None:
        check_words(self)
        factor, base = self.factor, self.base_channels
        require(factor in (0, 2, 4, 8, 16), "factor", factor, "2, 4, 8 or 16")
        at_least(1, self, "latent_channels", "blocks")
        require(base >= 4 and base % 4 == 0, "base_channels", base, "a multiple of 4")
        require(base <= 128 or base % 32 == 0, "base_channels", base, "a multiple of 32 above 128, the norms' groups")
        positive(self, "kl_weight")
        weight = self.critic_weight
        require(math.isfinite(weight) and weight >= 0, "critic_weight", weight, "a finite number, at least 0")
        at_least(0, self, "critic_start")
        unheard = self.critic_start > 0 and weight == 0
        require(not unheard, "critic_start", self.critic_start, "left out without --critic-weight")
        most, channels = 3 * factor**2, self.latent_channels
        require(factor == 0 or channels <= most, "latent_channels", channels, f"at most {most}, with --factor {factor}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution, the images' first."""
        return tuple(self.base_channels * min(2**level, 4) for level in range(self.factor.bit_length()))

    @property
    def norm_groups(self) -> int:
        """Groups of each GroupNorm: four channels each at the images' resolution, at most 32 groups."""
        return min(32, self.base_channels // 4)


@dataclass(frozen=True)
class LatentsConfig:
    """Whether the network works in the latents of an autoencoder, in place of pixels."""

    latents: str | None = None
    """A run of `python -m fastdiff autoencoder`, a checkpoint of one, or the folder of a diffusers AutoencoderKL or
    AutoencoderTiny: the network works in its latents, which set --image-size, --image-channels and --sigma-data."""
    pixels: int = 0
    """With --latents: height and width of the images; 0: as those that the autoencoder was trained on."""
    autoencoder_sha256: tyro.conf.Fixed[str] = ""
    """Of the autoencoder's weights."""

    def __post_init__(self) -> None:
        at_least(0, self, "pixels")
        require(self.pixels == 0 or self.latents is not None, "pixels", self.pixels, "left out without --latents")
        if self.latents is not None:
            require(self.latents.strip() != "", "latents", self.latents, "a path")
