"""Decoded image sets and encoded texts on disk: written once under a temporary name, checked whenever they are read.

A cache saves time and nothing else: one that cannot be read or written is a warning, and what it would hold is built.
Large arrays are mapped: they stay on the disk, and the system keeps in memory what is used of them.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fastdiff.errors import UserError

log = logging.getLogger(__name__)

MAPPED = 2**30  # bytes from which on an array is mapped
UNUSED_DAYS = 14  # after which a file of another version of the code or of packages is outdated
_DAMAGED = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)

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
    """An image set, stored as `cached_arrays` says."""
    return _unpack(cached_arrays(path, lambda: _pack(build()), outdated=outdated, check=_unpack))


def cached_arrays(
    path: Path | None,
    build: Callable[[], Arrays],
    *,
    outdated: str = "",
    check: Callable[[Arrays], object] = lambda arrays: None,
) -> Arrays:
    """What is stored at `path`; if there is nothing, or it is damaged, `build()`, which is then stored.

    Args:
        path: None for arrays that are not to be stored.
        outdated: a pattern of the names of files beside it, made by other versions of the code or of packages. Those
            that were not used for `UNUSED_DAYS` go when a new one is stored: another environment may use the others.
            Those that a killed writer left go as well.
        check: raises KeyError, TypeError or ValueError for arrays that are not what `build` makes.
    """
    if path is None:
        return build()
    try:
        arrays = _read(path)
        check(arrays)
        with suppress(OSError):  # another user's file
            os.utime(path)  # used now, also where a disk notes no reads
        return arrays
    except (FileNotFoundError, NotADirectoryError):
        pass
    except _DAMAGED as error:
        log.warning("%s is damaged or cannot be read (%s); it is made again", path, error)
    arrays = build()
    try:
        _write(path, arrays)
        for pattern in filter(None, (outdated, "*.npz.*.tmp")):  # a writer that was killed leaves one
            _remove_unused(path.parent.glob(pattern))
        if any(array.nbytes >= MAPPED for array in arrays.values()):
            return _read(path)  # mapped; the file without a name goes
    except OSError as error:
        log.warning("%s cannot be written (%s); what it would hold is made anew each time", path, error)
    return arrays


def _remove_unused(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):  # another process may be faster, or the file another user's
            used = max(file.stat().st_atime, file.stat().st_mtime)
            if time.time() - used > UNUSED_DAYS * 86400:
                file.unlink()


def _pack(decoded: Decoded) -> Arrays:
    arrays = {"images": decoded.images, "about": np.array(json.dumps(decoded.about))}
    return arrays if decoded.labels is None else {**arrays, "labels": decoded.labels}


def _unpack(arrays: Arrays) -> Decoded:
    return Decoded(arrays["images"], arrays.get("labels"), dict(json.loads(str(arrays["about"]))))


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        large = {info.filename.removesuffix(".npy"): info for info in file.zip.infolist() if info.file_size >= MAPPED}
        arrays = {name: _mapped(path, large[name]) if name in large else file[name] for name in file.files}
    if str(arrays.pop("sha256")) != _checksum(arrays):
        raise ValueError("its checksum differs")
    return arrays


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz that is not compressed, in its place in the file; writes stay in memory."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
        file.seek(info.header_offset + 30 + int(name) + int(extra))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its arrays are not plain numbers")
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")


def new_images(n: int, size: int, folder: Path | None = None) -> np.ndarray:
    """An uninitialised uint8 array (n, size, size, 3), see `new_array`."""
    return new_array((n, size, size, 3), np.uint8, folder, f"{n:,} images of {size} x {size}")


def new_array(shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None, what: str) -> np.ndarray:
    """An uninitialised array; a large one in a file in the folder that has no name, where there is room for it.

    Raises UserError if the memory does not suffice; says what needs how much.
    """
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    told = f"{what} need {needed / 2**30:.1f} GiB"
    if needed >= MAPPED and folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free >= 2 * needed:  # this file, and the one that it is copied into
                with tempfile.TemporaryFile(dir=folder) as file:
                    return np.memmap(file, dtype, "w+", shape=shape)
            log.warning("%s twice in %s, where %.1f are free; memory is used", told, folder, free / 2**30)
        except OSError as error:
            log.warning("%s cannot be written (%s); memory is used", folder, error)
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise UserError(f"{told}: choose a smaller image size, or name a disk with room by --data-root") from error


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files only their owner can read: others may share the data root.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, allow_pickle=False, **arrays, sha256=np.array(_checksum(arrays)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
