"""Decoded image sets and encoded texts on disk: written once under a temporary name, checked whenever they are read.

A cache saves time and nothing else: one that cannot be read or written is a warning, and what it would hold is built.
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
from typing import Any, NamedTuple, TypeVar

import numpy as np

log = logging.getLogger(__name__)

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


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
    return _cached(path, build, _pack, _unpack, outdated)


def cached_arrays(path: Path | None, build: Callable[[], Arrays], *, outdated: str = "") -> Arrays:
    """The same for arrays by name."""
    return _cached(path, build, dict, dict, outdated)


def _cached(
    path: Path | None,
    build: Callable[[], T],
    pack: Callable[[T], Arrays],
    unpack: Callable[[Arrays], T],
    outdated: str,
) -> T:
    if path is None:
        return build()
    try:
        return unpack(_read(path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s is damaged or cannot be read (%s); it is made again", path, error)
    built = build()
    try:
        _write(path, pack(built))
        for old in path.parent.glob(outdated) if outdated else ():
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be written (%s); what it would hold is made anew each time", path, error)
    return built


def _pack(decoded: Decoded) -> Arrays:
    arrays = {"images": decoded.images, "about": np.array(json.dumps(decoded.about))}
    return arrays if decoded.labels is None else {**arrays, "labels": decoded.labels}


def _unpack(arrays: Arrays) -> Decoded:
    return Decoded(arrays["images"], arrays.get("labels"), json.loads(str(arrays["about"])))


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    if str(arrays.pop("sha256")) != _checksum(arrays):
        raise ValueError("its checksum differs")
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    arrays = {**arrays, "sha256": np.array(_checksum(arrays))}
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
