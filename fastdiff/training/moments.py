"""The latents of the training images, encoded once, in the place of the images."""

import numpy as np
import torch

from fastdiff.config import Config
from fastdiff.data.cache import cache_folder, cached_arrays
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import Moments
from fastdiff.data.pixels import normalize
from fastdiff.reporting.progress import track
from fastdiff.runs.latents import AutoencoderWeights

BATCH = 64  # images encoded at a time


def with_statistics(config: Config, moments: Moments | None) -> Config:
    """The config with the mean and the standard deviation of each channel of the latents; a run keeps its first."""
    if moments is None or config.space.latent_std:
        return config
    mean, log_var = np.split(moments.images.reshape(-1, moments.images.shape[-1]).astype(np.float64), 2, 1)
    std = np.sqrt(mean.var(0) + np.exp(log_var).mean(0))
    return config.replace(latent_mean=tuple(mean.mean(0).tolist()), latent_std=tuple(std.tolist()))


def latent_moments(
    autoencoder: AutoencoderWeights, images: ImageSet, *, mirrored: bool, root: str, device: torch.device
) -> Moments:
    """Mean and log variance of the latents of each image, and with `mirrored` of each mirrored image.

    They are encoded in float32 with a progress bar, once: they are kept in the data root's cache, by the images'
    content and the autoencoder's weights.
    """
    views = 2 if mirrored else 1
    key = f"latents-{images.sha256[:16]}-{autoencoder.sha256[:16]}-{views}.npz"
    folder = cache_folder(root)

    @torch.no_grad()
    def build() -> dict[str, np.ndarray]:
        model, n = autoencoder.make(device), len(images.images)
        parts = []
        for start in track(range(0, n, BATCH), f"latents of {images.name}"):
            x = normalize(torch.from_numpy(images.images[start : start + BATCH].copy()).to(device))
            moments = [torch.cat(model.encode(each), 1) for each in (x, x.flip(3))[:views]]
            parts.append(torch.stack(moments, 1).permute(0, 1, 3, 4, 2).half().cpu().numpy())
        return {"moments": np.concatenate(parts)}

    stored = cached_arrays(folder and folder / key, build)
    return Moments(stored["moments"], images.name)
