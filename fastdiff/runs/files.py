"""Files that a crash or a full disk leaves whole."""

import errno
import logging
import os
import secrets
import shutil
from pathlib import Path

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # errors after which a run goes on without a file

log = logging.getLogger(__name__)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to a temporary name, syncs it to the disk and renames it, so that no reader sees half a file."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file into the place of a device
        raise OSError(errno.EEXIST, "is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and have the disk confirm it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_folder(parent: Path, prefix: str) -> Path:
    """A new folder with the permissions that the umask gives; one of tempfile's is its owner's alone."""
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def sync(directory: Path) -> None:
    """Have the disk confirm the names in a directory: a rename may else be lost in a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lines:
    """A file to which whole lines are appended; while the disk is full they wait in memory, and go out with the next.

    Only a power cut can leave half a line at its end.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, line: str) -> None:
        """Write the line, after those that wait; raises OSError unless the disk is only full."""
        data = self._waiting + line.encode()
        end, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            written = self._file.write(data)  # unbuffered: one write(2) for all
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        whole = data.rfind(b"\n", 0, written) + 1
        if whole < written:
            self._file.truncate(end + whole)
        if whole < len(data) and not self._waiting:
            free = shutil.disk_usage(self._path.parent).free
            log.warning(
                "%s: the disk is full, rows wait in memory (%s bytes are free, %s are needed)",
                self._path, f"{free:,}", f"{len(data) - whole:,}",
            )  # fmt: skip
        self._waiting = data[whole:]

    def sync(self) -> None:
        """Have the disk confirm what was written; a full disk has said so already."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def close(self) -> None:
        """Write what waits, if that is possible now, and close the file. Closing twice does nothing more."""
        if self._waiting and not self._file.closed:
            self.append("")
        self._file.close()
