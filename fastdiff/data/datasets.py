"""Image sets by name or path, as uint8 arrays in memory."""

import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastdiff.data.cache import cached, content_sha256
from fastdiff.data.cifar import load_cifar10
from fastdiff.data.decoding import decode_all, new_images, resize_all
from fastdiff.data.files import MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO, choose, open_files
from fastdiff.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size.

    Attributes:
        images: uint8 (N, H, W, 3), RGB, N >= 2.
        labels: int64 (N,), >= 0, or None where there are no classes.
        name: of the set and its split, e.g. "cifar10-train"; fit for a file name.
        sha256: of the content (images and labels), in hex; equal for equal content, wherever it came from.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    sha256: str

    @classmethod
    def from_arrays(cls, images: np.ndarray, labels: np.ndarray | None, name: str) -> "ImageSet":
        """An image set of arrays as described above.

        Raises:
            UserError: fewer than two images; training and the Frechet distance need at least two.
        """
        _at_least_two(len(images), name)
        return cls(images, labels, name, content_sha256(images, labels))

    def draw(self, n: int, *, seed: int) -> np.ndarray:
        """Indices of n different images, drawn at random: the first n of a folder are of one class."""
        return np.random.default_rng(seed).choice(len(self.images), n, replace=False)


def load_dataset(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "./data",
    split: Literal["train", "test"] = "train",
    image_size: int = 32,
) -> ImageSet:
    """Load an image set.

    Args:
        name: "cifar10", from `root` or downloaded to it; "digits", scikit-learn's 1,797 handwritten digits; or a path:

            - a folder of images, or a tar or zip archive of one, with subfolders train/ and test/ or without; see
              `fastdiff.data.files.choose` for splits and labels,
            - a `.npz` file with `images`, uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), and optionally `labels`,
              integers (N,).
        root: where CIFAR-10 is looked for, and where decoded folders and archives are kept (`.cache`), keyed by
            content, split and size.
        split: "train" or "test". The digits, a `.npz`, and a folder without train/ and test/ are all "train".
        image_size: pixels; other images get their shorter side resized to it and a centre crop. Grey becomes RGB.

    Raises:
        UserError: in one line, which file or value is wrong and what to do.
    """
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1 pixel")
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}; expected 'train' or 'test'")
    root = Path(root).expanduser()
    if name == "cifar10":
        images, labels = load_cifar10(root, split)
        return ImageSet.from_arrays(resize_all(images, image_size), labels, f"cifar10-{split}")
    if name == "digits":
        _only_train("digits", split)
        return ImageSet.from_arrays(*_digits(image_size), "digits-train")
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; expected cifar10, digits, a folder, an archive or a .npz file"
        )
    if path.suffix.lower() == ".npz":
        _only_train(path, split)
        images, labels = _npz(path)
        return ImageSet.from_arrays(resize_all(images, image_size), labels, f"{_stem(path)}-train")
    return ImageSet.from_arrays(*_files(path, root, split, image_size), f"{_stem(path)}-{split}")


def _only_train(name: str | Path, split: str) -> None:
    if split != "train":
        raise UserError(f"{name} has no split {split!r}, only 'train', which is all of it")


def _at_least_two(n: int, name: str | Path) -> None:
    if n < 2:
        raise UserError(f"{name}: the number of images is {n}; training and the Frechet distance need at least 2")


def _stem(path: Path) -> str:
    """The path's last part without suffixes, as a short and safe piece of a file name."""
    name = re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", path.name) if path.is_file() else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:64] or "images"


def _digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: 8x8 grey in 0..16, white on black, enlarged smoothly to uint8 (1797, size, size, 3)."""
    from sklearn.datasets import load_digits  # seconds to import, and only needed here

    digits = load_digits()
    images = new_images(len(digits.images), size)
    for image, grey in zip(images, digits.images, strict=True):
        # In floats, so that the interpolation works on the exact values and rounds once, at the end.
        enlarged = Image.fromarray(grey.astype(np.float32) * (255 / 16)).resize((size, size), Image.Resampling.BICUBIC)
        image[:] = np.clip(np.rint(np.asarray(enlarged)), 0, 255)[:, :, None]
    return images, digits.target.astype(np.int64)


def _files(path: Path, root: Path, split: str, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    files = open_files(path)

    def build() -> tuple[np.ndarray, np.ndarray | None]:
        names, labels = choose(files.names(), split, path)
        _at_least_two(len(names), path)  # before anything is stored
        place = {name: i for i, name in enumerate(names)}
        items = ((place[name], str(path / name), data) for name, data in files.read(names))
        return decode_all(items, len(names), size), None if labels is None else np.array(labels, dtype=np.int64)

    return cached(root / ".cache" / f"{_stem(path)}-{split}-{size}-{files.fingerprint()[:16]}.npz", build)


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 (N, H, W, 3) or (N, H, W), labels int64 (N,) or None, of a `.npz` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size):
            raise UserError(f"{path} unpacks to over {MAX_UNPACKED_RATIO} times its size; save it without compression")
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise UserError(f"{path} has no array 'images', only {', '.join(file) or 'nothing'}; save one")
            images, labels = file["images"], file.get("labels")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; save it again with numpy.savez") from error
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise UserError(
            f"{path}: 'images' is {images.dtype} {images.shape}; expected uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)"
        )
    if 0 in images.shape[1:3]:
        raise UserError(f"{path}: 'images' has shape {images.shape}, without a pixel; save images of at least 1 x 1")
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1]:
        raise UserError(f"{path}: 'labels' has shape {labels.shape}, expected ({len(images)},): one for each image")
    if not np.issubdtype(labels.dtype, np.integer) or (len(labels) and labels.min() < 0):
        raise UserError(f"{path}: 'labels' must be integers of at least 0, not {labels.dtype}; renumber the classes")
    return images, labels.astype(np.int64)
