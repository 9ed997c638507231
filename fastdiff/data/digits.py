"""scikit-learn's 1,797 handwritten digits: 8x8 grey in 0..16, white on black."""

import numpy as np
from PIL import Image

from fastdiff.data.cache import new_images


def load_greys() -> tuple[np.ndarray, np.ndarray]:
    """The digits: float32 (1797, 8, 8), whole numbers in 0..16, and int64 (1797,) in 0..9."""
    from sklearn.datasets import load_digits  # seconds to import, and only needed here

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


def enlarged(grey: np.ndarray, size: int) -> np.ndarray:
    """(8, 8) float32 in 0..16 -> (size, size) float32 in 0..255, smoothly; the rounding is left to the caller."""
    image = Image.fromarray(grey * np.float32(255 / 16)).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image), 0, 255)


def digit_images(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits as RGB, uint8 (1797, size, size, 3), and their labels."""
    greys, labels = load_greys()
    images = new_images(len(greys), size)
    for image, grey in zip(images, greys, strict=True):
        image[:] = np.rint(enlarged(grey, size))[:, :, None]
    return images, labels
