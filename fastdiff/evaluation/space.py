"""What a network works in: pixels, or the latents of an autoencoder. All else is the same for both."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.data.pixels import normalize, to_uint8
from fastdiff.diffusion.likelihood import dequantize
from fastdiff.interop_autoencoder import TinyAutoencoder
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.fuse import fuse
from fastdiff.runtime.graphs import CapturedFunction

Shape = tuple[int, int, int]
Normal = Callable[[torch.Size], Tensor]  # shape (N, ...) of this rank's images -> standard normal


class Pixels:
    """Pixels from -1 to 1; its methods say what a space does."""

    def sample(self, batch: Tensor, normal: Normal) -> Tensor:
        """A batch of a loader as (N, H, W, C): latents are drawn from their moments here, outside the compiled loss."""
        return batch

    def x0(self, batch: Tensor) -> Tensor:
        """What the network sees of a batch from `sample`: (N, C, H, W), float32, channels_last; compiled."""
        return normalize(batch)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the network sees of raw images, uint8 (N, H, W, 3).

        With a generator it is random within each image: a uniform variate spreads each level (Theis et al. 2016).
        """
        if generator is None:
            return normalize(images)
        return dequantize(images.permute(0, 3, 1, 2), generator=generator)

    def clip(self, x0_hat: Tensor) -> Tensor:
        """An estimate of x0, kept where x0 can lie."""
        return x0_hat.clamp(-1.0, 1.0)

    def decode(self, x0: Tensor) -> Tensor:
        """Images, uint8 (N, 3, H, W)."""
        return to_uint8(x0)

    def image_shape(self, shape: Shape) -> Shape:
        """Shape (3, H, W) of the images that a network of this shape draws."""
        return shape


class Latents:
    """Latents of an autoencoder, each channel with mean 0 and standard deviation 1 over the images it was measured on.

    Args:
        autoencoder: in eval mode, its weights fixed, on the device.
        fused: decode by our kernels.
        graphs: capture the decoder in CUDA graphs.
    """

    def __init__(self, autoencoder: Autoencoder | TinyAutoencoder, *, fused: bool = False, graphs: bool = True) -> None:
        self.autoencoder = autoencoder
        self.mean, self.std = autoencoder.latent_mean[:, None, None], autoencoder.latent_std[:, None, None]
        ours = fused and isinstance(autoencoder, Autoencoder)
        decoder = fuse(autoencoder.decoder) if ours else autoencoder.decode
        self._decode = CapturedFunction(
            lambda z: to_uint8(decoder(z)), device=self.mean.device, capture=graphs, what="the decoder"
        )

    def sample(self, batch: Tensor, normal: Normal) -> Tensor:
        """batch: `moments` in the loader's order, (N, H, W, 2 C)."""
        mean, log_var = batch.float().chunk(2, -1)
        return mean + (0.5 * log_var).exp() * normal(mean.shape)

    def x0(self, batch: Tensor) -> Tensor:
        return batch.permute(0, 3, 1, 2)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log variance of the latents (N, 2 C, h, w) of images (N, 3, H, W) in [-1, 1]."""
        mean, log_var = self.autoencoder.encode(x)
        return torch.cat([(mean - self.mean) / self.std, log_var - 2 * self.std.log()], 1)  # variance / std^2

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The means of their latents, or with a generator random latents."""
        z, log_var = self.moments(normalize(images.to(self.mean.device))).chunk(2, 1)
        if generator is not None:
            z = z + (0.5 * log_var).exp() * torch.randn(z.shape, generator=generator, device=z.device)
        return z.contiguous(memory_format=torch.channels_last)

    def clip(self, x0_hat: Tensor) -> Tensor:
        """Latents have no bounds."""
        return x0_hat

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        z = x0.float() * self.std + self.mean
        return self._decode(z.contiguous(memory_format=torch.channels_last))

    def image_shape(self, shape: Shape) -> Shape:
        _, height, width = shape
        factor = self.autoencoder.config.factor
        return 3, factor * height, factor * width


Space = Pixels | Latents
PIXELS = Pixels()
