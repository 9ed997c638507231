"""Image sets by name or path, as uint8 arrays in memory."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import PIL

from fastdiff._kernels import source_hash
from fastdiff.data.cache import Decoded, cache_folder, cached, content_sha256
from fastdiff.data.captioned_digits import DIGITS, captioned_digits
from fastdiff.data.captions import Captions, caption_files, caption_templates, read_captions
from fastdiff.data.cifar import CLASS_NAMES, load_cifar10
from fastdiff.data.decoding import DARK, decode_all, resize_all
from fastdiff.data.digits import digit_images
from fastdiff.data.emoji import ATTRIBUTION, load_emoji
from fastdiff.data.files import Folder, open_files
from fastdiff.data.layout import Choice, choose, some
from fastdiff.data.npz import read_npz
from fastdiff.errors import UserError
from fastdiff.words import counted

log = logging.getLogger(__name__)

LOW_RANGE = 16  # levels of grey: a set with fewer holds bits, or 12 bits of 16, or is all but black


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size."""

    images: np.ndarray  # uint8 (N, H, W, 3), RGB, N >= 2, of at least two values
    labels: np.ndarray | None  # int64 (N,), >= 0, or None where there are no classes
    class_names: tuple[str, ...] | None  # of all classes, by label; None where they have no names
    name: str  # of the set and its split, e.g. "cifar10-train"; fit for a file name
    sha256: str  # of the content (images and labels), in hex; equal for equal content, wherever it came from
    notes: tuple[str, ...] = ()  # what the split is, and what was passed over, for people
    captions: Captions | None = None  # of each image; None where none were asked for, and the set has none of its own

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None,
        name: str,
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        captions: Captions | None = None,
    ) -> "ImageSet":
        """A set of arrays as described above. Raises UserError for fewer than two images, or pixels of one value."""
        _range(images, name)
        names = None if class_names is None else tuple(class_names)
        return cls(images, labels, names, name, content_sha256(images, labels), tuple(notes), captions)

    @cached_property
    def captions_sha256(self) -> str | None:
        """SHA-256 (hex) of the captions: a hash of their own, so that runs without text keep theirs."""
        return None if self.captions is None else hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()

    def with_templates(self, path: str | os.PathLike[str]) -> "ImageSet":
        """This set with captions by a file of templates. Raises UserError for no class names, or no such file."""
        if self.labels is None or self.class_names is None:
            raise UserError(f"{self.name} has no class names, which the templates of {path} need; caption its images")
        of_class = caption_templates(expanded(path), self.class_names)
        return replace(self, captions=tuple(of_class[label] for label in self.labels))

    def describe(self) -> str:
        """One line: name, split, number and size of the images, classes, range of the pixels, and what is left out."""
        n, height, width, _ = self.images.shape
        parts = [f"{self.name}: {n:,} images of {width}x{height}", *self.notes[:1]]
        if self.labels is not None:
            counts = np.bincount(self.labels)
            names = self.class_names or list(map(str, range(len(counts))))
            shown = [f"{names[i]} {counts[i]:,}" for i in np.flatnonzero(counts)]
            parts.append(f"{counted(len(shown), 'class', 'classes')}: {some(shown, 10)}")
        if self.captions is not None:
            distinct = dict.fromkeys(caption for captions in self.captions for caption in captions)
            parts.append(f"{counted(len(distinct), 'caption')}, such as {', '.join(map(repr, islice(distinct, 3)))}")
        mean = self.images.mean(dtype=np.float64)
        parts += [f"pixels {self.images.min()} to {self.images.max()}, mean {mean:.1f}", *self.notes[1:]]
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in "; ".join(parts))

    def draw(self, n: int, *, seed: int) -> np.ndarray:
        """Indices of n different images, drawn at random: the first n of a folder are of one class."""
        return np.random.default_rng(seed).choice(len(self.images), n, replace=False)


def load_dataset(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "./data",
    split: Literal["train", "test"] = "train",
    image_size: int = 32,
    captions: bool | str | os.PathLike[str] = False,
) -> ImageSet:
    """Load an image set.

    Args:
        name: "cifar10", from `root` or downloaded to it; "digits", scikit-learn's 1,797 handwritten digits;
            "digits-captioned", these in colours and places that captions name (`captioned_digits`); "openmoji", emoji
            with their names as captions, from the extra `emoji`; or a path:

            - a folder of images, or a tar or zip archive of one, with subfolders train/ and test/ or without; see
              `fastdiff.data.layout.choose` for splits and labels,
            - a `.npz` file with `images`, uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), and optionally `labels`,
              integers (N,), and `class_names`, strings, one for each label; `captions`, strings (N,) or (N, K).
        root: where CIFAR-10 is looked for, and where decoded folders and archives are kept (`.cache`), keyed by
            content, split, size, and the version of what decodes them.
        split: "train" or "test". The digits, a `.npz`, and a folder without train/ and test/ are all "train".
        image_size: pixels; other images get their shorter side resized to it and a centre crop. Grey becomes RGB.
        captions: True for the captions that come with the images (`fastdiff.data.captions.read_captions`), or a file
            of templates, which make them of the class names (`caption_templates`).

    Raises:
        UserError: in one line, which file or value is wrong and what to do.
    """
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1 pixel")
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}; expected 'train' or 'test'")
    built_in = BUILT_IN.get(name)
    if built_in is not None:
        image_set = built_in(root, split, image_size)
    else:
        image_set = _at_path(expanded(name), root, split, image_size, captions is True)
    if captions is True and image_set.captions is None:
        raise UserError(f"{name} has no captions; make them of its class names by a file of templates")
    return image_set if isinstance(captions, bool) else image_set.with_templates(captions)


def _cifar10(root: str | os.PathLike[str], split: str, size: int) -> ImageSet:
    images, labels = load_cifar10(expanded(root), split)
    return ImageSet.from_arrays(resize_all(images, size), labels, f"cifar10-{split}", CLASS_NAMES, [f"split {split}"])


def _digits(root: str | os.PathLike[str], split: str, size: int) -> ImageSet:
    _only_train("digits", split)
    return ImageSet.from_arrays(*digit_images(size), "digits-train", "0123456789", ["split train: all of it"])


def _captioned_digits(root: str | os.PathLike[str], split: str, size: int) -> ImageSet:
    images, labels, captions = captioned_digits(split, size)
    which = "held-out" if split == "test" else "all but held-out"
    notes = [f"split {split}: {which} pairs of digit and colour"]
    return ImageSet.from_arrays(images, labels, f"digits-captioned-{split}", DIGITS, notes, captions)


def _openmoji(root: str | os.PathLike[str], split: str, size: int) -> ImageSet:
    _only_train("openmoji", split)
    images, _, about = load_emoji(cache_folder(root), size, _decoder())
    captions = tuple(map(tuple, about["captions"]))
    notes = ["split train: all of it", ATTRIBUTION]
    return ImageSet.from_arrays(images, None, "openmoji-train", None, notes, captions)


BUILT_IN = {  # name -> function of root, split and image_size
    "cifar10": _cifar10, "digits": _digits, "digits-captioned": _captioned_digits, "openmoji": _openmoji,
}  # fmt: skip


def _at_path(path: Path, root: str | os.PathLike[str], split: str, size: int, captions: bool) -> ImageSet:
    try:
        path.stat()
    except OSError as error:
        reason = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
        expected = f"{', '.join(BUILT_IN)}, a folder, an archive or a .npz file"
        raise UserError(f"{path}: {reason}; expected {expected}") from error
    if path.suffix.lower() == ".npz":
        _only_train(path, split)
        images, labels, about = read_npz(path, captions=captions)
        images = resize_all(images, size)
    else:
        images, labels, about = _files(path, cache_folder(root), split, size, captions)
    remarks = list(about["remarks"])
    low, high = _range(images, path)
    if high - low < LOW_RANGE and not any(DARK in remark for remark in remarks):
        remedy = f"multiply them by {255 // high}" if high < 128 else "spread them over 0 to 255"
        remarks.append(f"all pixels are in {low} to {high}, of 0 to 255: {remedy}")
    for remark in remarks:
        log.warning("%s: %s", path, remark)
    name, about_captions = f"{_stem(path)}-{split}", about.get("captions")
    return ImageSet.from_arrays(images, labels, name, about["class_names"], about["notes"], about_captions)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path, its `~` expanded. Raises UserError for a `~` that stands for no folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no folder is known for its ~ ({error}); give the whole path") from error


def _only_train(name: str | Path, split: str) -> None:
    if split != "train":
        raise UserError(f"{name} has no split {split!r}, only 'train', which is all of it")


def _at_least_two(n: int, name: str | Path) -> None:
    if n < 2:
        raise UserError(f"{name}: the number of images is {n}; training and the Frechet distance need at least 2")


def _range(images: np.ndarray, name: str | Path) -> tuple[int, int]:
    """The least and the largest pixel; a UserError where they are equal, or where there are fewer than two images."""
    _at_least_two(len(images), name)
    low, high = int(images.min()), int(images.max())
    if low == high:
        raise UserError(f"{name}: every pixel of the {len(images):,} images is {low}; check how they were made")
    return low, high


def _stem(path: Path) -> str:
    """The path's last part without suffixes, as a short and safe piece of a file name."""
    name = re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", path.name) if path.is_file() else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:64] or "images"


def _files(path: Path, folder: Path | None, split: str, size: int, captions: bool) -> Decoded:
    files = open_files(path)

    @cache
    def chosen(captions: bool = False) -> Choice:
        used = chain(*caption_files(files)) if captions else ()
        return choose(files.listing.without(used), split, path)

    def build() -> Decoded:
        names, labels = chosen().names, chosen().labels
        _at_least_two(len(names), path)  # before anything is decoded
        place = {name: i for i, name in enumerate(names)}
        items = ((place[name], name, data) for name, data in files.read(names))
        images, remarks = decode_all(items, len(names), size, path, folder)
        _range(images, path)  # before anything is stored
        # Notes as without captions: an archive's are not read again, and the next load may ask for none.
        about = {"class_names": chosen().class_names, "notes": chosen().notes, "remarks": remarks}
        return Decoded(images, None if labels is None else np.array(labels, dtype=np.int64), about)

    of_images = read_captions(files, chosen().names) if captions else None  # before anything is decoded
    key = f"{_stem(path)}-{split}-{size}-{files.fingerprint()[:16]}"
    place = None if folder is None else folder / f"{key}-{_decoder()}.npz"
    decoded = cached(place, build, outdated=f"{key}*.npz")
    if isinstance(files, Folder) or captions:  # its other files may have changed since
        now = chosen(captions)
        decoded.about.update(class_names=now.class_names, notes=now.notes, captions=of_images)
    return decoded


def _decoder() -> str:
    """The version of the code that decodes: the sources in this folder, and Pillow."""
    code = source_hash(Path(__file__).parent.parent, ["data"])
    return hashlib.sha256(f"{code} {PIL.__version__}".encode()).hexdigest()[:8]
