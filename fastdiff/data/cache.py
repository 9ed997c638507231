"""Decoded image sets on disk: written once under a temporary name, checked whenever they are read.

A cache saves time and nothing else: one that cannot be read or written is a warning, and the set is built.
"""

import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """What is stored: images uint8 (N, H, W, 3), labels int64 (N,) or None, and notes that JSON can hold."""

    images: np.ndarray
    labels: np.ndarray | None
    about: dict[str, Any]


def cache_folder(root: str | os.PathLike[str]) -> Path | None:
    """`.cache` in a data root; None, with a warning, where the root begins with a `~` that stands for no folder."""
    try:
        return Path(root).expanduser() / ".cache"
    except RuntimeError as error:
        log.warning("nothing is cached in %s: %s", root, error)
        return None


def content_sha256(images: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 (hex) of an image set: shape and bytes of its images and, if there are any, of its labels."""
    digest = hashlib.sha256()
    for array in (images, labels):
        digest.update(repr(None if array is None else array.shape).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def cached(path: Path | None, build: Callable[[], Decoded], *, outdated: str = "") -> Decoded:
    """What is stored at `path`; if there is nothing, or it is damaged, `build()`, which is then stored.

    Args:
        path: None for a set that is not to be stored.
        outdated: a pattern of the names of files beside it that the new one replaces.
    """
    if path is None:
        return build()
    try:
        return _read(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s is damaged or cannot be read (%s); the images are decoded again", path, error)
    decoded = build()
    try:
        _write(path, decoded)
        for old in path.parent.glob(outdated) if outdated else ():
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be written (%s); the images are decoded anew each time", path, error)
    return decoded


def _checksum(images: np.ndarray, labels: np.ndarray | None, about: str) -> str:
    return hashlib.sha256(f"{content_sha256(images, labels)} {about}".encode()).hexdigest()


def _read(path: Path) -> Decoded:
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file.get("labels")
        about, sha256 = str(file["about"]), str(file["sha256"])
    if _checksum(images, labels, about) != sha256:
        raise ValueError("its checksum differs")
    return Decoded(images, labels, json.loads(about))


def _write(path: Path, decoded: Decoded) -> None:
    images, labels, about = decoded.images, decoded.labels, json.dumps(decoded.about)
    arrays = {"images": images, "about": np.array(about), "sha256": np.array(_checksum(images, labels, about))}
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
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)
