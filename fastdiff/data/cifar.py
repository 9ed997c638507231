"""CIFAR-10 in its original form: found, downloaded, checked and read.

Source: https://www.cs.toronto.edu/~kriz/cifar.html (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009).
"""

import hashlib
import http.client
import io
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np

from fastdiff.data.download import fetch
from fastdiff.errors import UserError
from fastdiff.words import counted

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
FOLDER = "cifar-10-batches-py"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {  # split -> file -> MD5, as in torchvision.datasets.CIFAR10
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}


def load_cifar10(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 from `root`: the extracted folder, else the archive, which is downloaded if it is not there.

    Returns:
        images uint8 (N, 32, 32, 3), labels int64 (N,) in 0..9; N is 50,000 for "train", 10,000 for "test".

    Raises:
        UserError: a file is damaged or missing, or the download fails.
    """
    contents = _from_folder(root / FOLDER, split) if (root / FOLDER).is_dir() else _from_archive(root, split)
    batches = [_unpickle(content) for content in contents]
    data = np.concatenate([batch["data"] for batch in batches])  # (N, 3072): all red, then green, then blue
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, np.concatenate([np.asarray(batch["labels"], dtype=np.int64) for batch in batches])


def _from_folder(folder: Path, split: str) -> list[bytes]:
    remedy = f"copy it again, or remove {folder} so that the archive is used or downloaded"
    contents = []
    for name, md5 in BATCHES[split].items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}; {remedy}") from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            size = counted(len(content), "byte")
            raise UserError(f"{folder / name} is damaged or truncated ({size}, wrong MD5); {remedy}")
        contents.append(content)
    return contents


def _from_archive(root: Path, split: str) -> list[bytes]:
    archive = root / ARCHIVE
    if not archive.exists():
        _download(archive)
    try:
        with open(archive, "rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != ARCHIVE_MD5:
            raise UserError(f"{archive} is damaged or truncated: its MD5 is {md5}, expected {ARCHIVE_MD5}; remove it")
        with tarfile.open(archive) as tar:
            files = [tar.extractfile(f"{FOLDER}/{name}") for name in BATCHES[split]]
            return [file.read() for file in files if file is not None]
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive} cannot be read: {error}; remove it to download it again") from error


def _download(archive: Path) -> None:
    try:
        fetch(URL, archive, algorithm="md5", digest=ARCHIVE_MD5, size=ARCHIVE_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"cifar10 is not under {archive.parent} (neither {FOLDER}/ nor {ARCHIVE}), and downloading {URL} failed "
            f"({str(error) or type(error).__name__}): put the file at {archive} by hand, or use --data digits, which "
            "needs no network"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers, and calls nothing else that a pickle may name."""

    ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch does")
        return self.ALLOWED[module, name]


def _unpickle(content: bytes) -> dict:
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
