"""Decoded image sets on disk: written once under a temporary name, checked whenever they are read."""

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastdiff.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray | None]  # images uint8 (N, H, W, 3), labels int64 (N,) or None


def content_sha256(images: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 (hex) of an image set: shape and bytes of its images and, if there are any, of its labels."""
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(repr(None if array is None else array.shape).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def cached(path: Path, build: Callable[[], Arrays]) -> Arrays:
    """The arrays stored at `path`; if there are none, or damaged ones, `build()`, which is then stored.

    Raises:
        UserError: the cache cannot be written; nothing is left behind then.
    """
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(f"{path} is damaged ({error}) and is built again", stacklevel=2)
    arrays = build()
    _write(path, *arrays)
    return arrays


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        images, labels, sha256 = file["images"], file.get("labels"), str(file["sha256"])
    if content_sha256(images, labels) != sha256:
        raise ValueError("its checksum differs")
    return images, labels


def _write(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    arrays = {"images": images, "sha256": np.array(content_sha256(images, labels))}
    if labels is not None:
        arrays["labels"] = labels
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; free some space, or choose another data root") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)
