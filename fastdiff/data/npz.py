"""Images and labels in an `.npz` file, checked for what they can hardly mean."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fastdiff.data.cache import Decoded
from fastdiff.data.captions import npz_captions
from fastdiff.data.files import MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO
from fastdiff.data.layout import some
from fastdiff.errors import UserError

ARRAYS = ("images", "labels", "class_names")
MAX_CLASSES = 2**20  # a label beyond is no class, but a hash, or -1 that wrapped around


def read_npz(path: Path, *, captions: bool = False) -> Decoded:
    """Images uint8 (N, H, W, 3) or (N, H, W); labels int64 (N,) or None; their names and the other arrays' as notes.

    With `captions` that array too, to `about["captions"]`.

    Raises:
        UserError: the file is damaged, or an array is not what it should be; says which, and how to convert it.
    """
    arrays, others = _load(path, (*ARRAYS, *["captions"][:captions]))
    images = _images(path, arrays["images"])
    class_names = _class_names(path, arrays.get("class_names"))
    labels = _labels(path, arrays["labels"], len(images), class_names) if "labels" in arrays else None
    notes = ["split train: all of it"]
    if others:
        notes.append(f"left out: other arrays ({len(others):,}): {some(list(map(repr, others)))}")
    about = {"class_names": class_names, "notes": notes, "remarks": []}
    if captions:
        if "captions" not in arrays:
            raise UserError(f"{path} has no array 'captions'; save one, or make captions of class names by templates")
        about["captions"] = npz_captions(path, arrays["captions"], len(images))
    return Decoded(images, labels, about)


def _load(path: Path, wanted: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The wanted arrays that are there, and the names of the others."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size):
            raise UserError(f"{path} unpacks to over {MAX_UNPACKED_RATIO} times its size; save it without compression")
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise UserError(f"{path} has no array 'images', only {', '.join(file) or 'nothing'}; save one")
            return {name: file[name] for name in wanted if name in file}, [name for name in file if name not in wanted]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; save it again with numpy.savez") from error


def _images(path: Path, images: np.ndarray) -> np.ndarray:
    """The images as uint8 (N, H, W, 3) or grey (N, H, W)."""
    what = f"{path}: 'images' is {images.dtype} {images.shape}"
    if images.ndim == 3 and images.shape[2] in (3, 4):
        raise UserError(
            f"{what}, which is one image of {images.shape[2]} channels, or many grey ones that are "
            f"{images.shape[2]} pixels wide; save images[None] for the one, images[..., None] for the others"
        )
    remedies = [_to_uint8(images)] if images.dtype != np.uint8 else []
    other_channels = images.ndim == 4 and images.shape[3] not in (1, 3)
    if other_channels:
        remedies += ["images.transpose(0, 2, 3, 1)"] * (images.shape[1] in (1, 3))
        remedies += ["images[..., :3]"] * (images.shape[3] == 4)
    if remedies or other_channels or images.ndim not in (3, 4):
        advice = f"; save {' and '.join(remedies)}" if remedies else ""
        raise UserError(f"{what}; expected uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W){advice}")
    if 0 in images.shape[1:3]:
        raise UserError(f"{what}, without a pixel; save images of at least 1 x 1")
    return images[..., 0] if images.shape[3:] == (1,) else images


def _to_uint8(images: np.ndarray) -> str:
    """How to convert an array of another type, as its range suggests."""
    if images.dtype == bool:
        return "images.astype(np.uint8) * 255"
    low, high = (images.min(), images.max()) if images.size and images.dtype.kind in "iuf" else (0, 0)
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return ("(images * 255)" if low >= 0 else "((images + 1) * 127.5)") + ".round().astype(np.uint8)"
    if images.dtype.kind in "iu" and high > 255:
        return f"(images >> {int(high).bit_length() - 8}).astype(np.uint8)"
    return "images.round().clip(0, 255).astype(np.uint8)"


def _class_names(path: Path, names: np.ndarray | None) -> list[str] | None:
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise UserError(f"{path}: 'class_names' is {names.dtype} {names.shape}; expected strings, one for each label")
    return None if names is None else [str(name) for name in names.astype(str)]


def _labels(path: Path, labels: np.ndarray, n: int, class_names: list[str] | None) -> np.ndarray:
    if labels.shape != (n,):
        raise UserError(f"{path}: 'labels' has shape {labels.shape}, expected ({n},): one for each image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{path}: 'labels' must be integers, not {labels.dtype}; number the classes from 0")
    limit = MAX_CLASSES if class_names is None else len(class_names)
    if n and not 0 <= labels.min() <= labels.max() < limit:
        why = "" if class_names is None else f", as there are {limit:,} 'class_names'"
        raise UserError(
            f"{path}: 'labels' are {labels.min()} to {labels.max()}, but must be at least 0 and below {limit:,}{why}; "
            "renumber the classes"
        )
    return labels.astype(np.int64)
