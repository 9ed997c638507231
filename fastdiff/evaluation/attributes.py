"""Reads digit, colour, background and position from a picture of `digits-captioned`, or from one like it.

On the set itself, at 16 pixels, all colours and backgrounds are read right, 99.9% of the positions and 99.4% of the
digits. Digits that the classifier was not fitted to: 97.0% (fitted to one half of the handwritten digits, read on the
other).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from fastdiff.data.captioned_digits import BACKGROUNDS, COLOURS, Attributes, corners, digit_side, named
from fastdiff.data.digits import load_greys


def read_attributes(images: np.ndarray) -> Attributes:
    """What pictures show, by the fit of each colour, the ink's centre, and a classifier of the real digits.

    Args:
        images: uint8 (N, H, W, 3), square, of at least 16 pixels.
    """
    pixels = images.astype(np.float32)
    edge = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)
    backgrounds = _table(BACKGROUNDS)
    background = _distance(np.median(edge, 1)[:, None], backgrounds).argmin(1)
    colour, ink = _ink(pixels, backgrounds[background])
    position = _position(ink)
    return Attributes(_digit(ink, position), colour, background, position)


def agreement(images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """The share of pictures that show what their prompts name, for each attribute that any prompt names, in [0, 1].

    Args:
        images: uint8 (N, H, W, 3), as for `read_attributes`.
        prompts: N, each of which names the attributes by the captions' words.
    """
    found, asked = read_attributes(images)._asdict(), [named(prompt) for prompt in prompts]
    hits = {
        name: [values[i] == each[name] for i, each in enumerate(asked) if name in each]
        for name, values in found.items()
    }
    return {name: float(np.mean(each)) for name, each in hits.items() if each}


def _table(colours: dict[str, tuple[int, int, int]]) -> np.ndarray:
    return np.array(list(colours.values()), np.float32)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a - b) ** 2).sum(-1)


def _ink(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour (N,) and the share (N, H, W), in [0, 1], of it at each pixel: the inverse of the rendering's mixture.

    For each colour, each pixel's share is the nearest point between background and colour; the colour that leaves the
    least of the picture unexplained is the digit's.
    """
    offset = pixels - background[:, None, None]
    fits = []
    for colour in _table(COLOURS):
        direction = colour - background  # (N, 3)
        share = np.einsum("nhwc,nc->nhw", offset, direction) / (direction**2).sum(-1)[:, None, None]
        share = share.clip(0, 1)
        left = _distance(offset, share[..., None] * direction[:, None, None]).sum((1, 2))
        fits.append((left, share))
    lefts, shares = (np.stack(each, 1) for each in zip(*fits, strict=True))
    colour = lefts.argmin(1)
    return colour, shares[np.arange(len(pixels)), colour]


def _position(ink: np.ndarray) -> np.ndarray:
    """The position whose middle is nearest to the ink's centre of mass; faint ink is noise."""
    size, ink = ink.shape[1], np.where(ink > 0.25, ink, 0)
    weight = ink / np.maximum(ink.sum((1, 2), keepdims=True), 1e-6)
    row, column = (weight.sum(axis) @ np.arange(size) for axis in (2, 1))
    middles = corners(size) + (digit_side(size) - 1) / 2
    return _distance(np.stack([row, column], 1)[:, None], middles).argmin(1)


def _digit(ink: np.ndarray, position: np.ndarray) -> np.ndarray:
    """What the classifier reads in the window of the position, reduced to 8x8."""
    side = digit_side(ink.shape[1])
    windows = [
        image[r : r + side, c : c + side] for image, (r, c) in zip(ink, corners(ink.shape[1])[position], strict=True)
    ]
    return read_digits(np.stack(windows))


def read_digits(grey: np.ndarray) -> np.ndarray:
    """What the classifier reads in pictures of digits alone, white on black: float32 (N, H, W) in [0, 1] -> (N,)."""
    from PIL import Image

    small = [np.asarray(Image.fromarray(picture).resize((8, 8), Image.Resampling.BOX)) for picture in grey]
    return _classifier().predict(np.stack(small).reshape(len(grey), 64) * 16)


@cache
def _classifier() -> Any:
    """scikit-learn's own example for its digits, fitted to all of them."""
    from sklearn.svm import SVC

    greys, labels = load_greys()
    return SVC(gamma=0.001).fit(greys.reshape(len(greys), 64), labels)
