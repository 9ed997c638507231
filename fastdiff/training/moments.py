"""The latents of the training images, encoded once, in the place of the images."""

from pathlib import Path

import numpy as np
import torch

from fastdiff._kernels import source_hash
from fastdiff.data.cache import cache_folder, cached_arrays, new_array
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import Moments
from fastdiff.data.pixels import normalize
from fastdiff.errors import UserError
from fastdiff.evaluation.space import Latents
from fastdiff.reporting.progress import track

CODE = ["nets/autoencoder.py", "nets/layers.py", "evaluation/space.py", "training/moments.py"]  # what encodes
PIXELS_AT_A_TIME = 2**18  # 256 images of 32 x 32, or one of 512 x 512


def latent_moments(space: Latents, images: ImageSet, *, sha256: str, mirrored: bool, root: str) -> Moments:
    """Mean and log variance of the latents of each image, and with `mirrored` of each mirrored image.

    They are encoded in float32 with a progress bar, once: they are kept in the data root's cache, by the images'
    content, the autoencoder's weights (`sha256`) and the version of what encodes.

    Raises:
        UserError: latents that are not finite, or too large for float16.
    """
    views, folder = 2 if mirrored else 1, cache_folder(root)
    key = f"latents-{images.sha256[:16]}-{sha256[:16]}-{views}-"
    code = source_hash(Path(__file__).parent.parent, CODE)
    n, height, width, _ = images.images.shape
    at_a_time = max(1, PIXELS_AT_A_TIME // (height * width))

    def build() -> dict[str, np.ndarray]:
        moments = None
        for start in track(range(0, n, at_a_time), f"latents of {images.name}"):
            part = images.images[start : start + at_a_time].copy()  # the set may be read-only
            x = normalize(torch.from_numpy(part).to(space.mean.device))
            found = torch.stack([space.moments(each) for each in (x, x.flip(3))[:views]], 1)
            half = found.permute(0, 1, 3, 4, 2).half().cpu().numpy()
            if moments is None:
                moments = new_array((n, *half.shape[1:]), np.float16, folder, f"the latents of {images.name}")
            moments[start : start + at_a_time] = half
        if moments is None or not np.isfinite(moments).all():
            raise UserError(
                "the autoencoder of --latents gives latents that are not finite, or beyond 65,504 times their standard "
                "deviation; train it again."
            )
        return {"moments": moments}

    place = None if folder is None else folder / f"{key}{code[:8]}.npz"
    return Moments(cached_arrays(place, build, outdated=f"{key}*.npz")["moments"], images.name)
