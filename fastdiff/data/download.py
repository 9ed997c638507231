"""Files from the network: in bounded time, fetched once by several processes, and there only when they are right."""

import fcntl
import hashlib
import os
import queue
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastdiff.words import counted

BLOCK_BYTES = 2**16
STALL_SECONDS = 15.0  # a download fails if the next block takes longer: nothing comes, or less than 4 KiB/s
DEADLINE_SECONDS = 3600.0  # of a whole download, and for how long another process's is waited for


def fetch(url: str, path: Path, *, algorithm: str, digest: str, size: int) -> None:
    """Make `path` the file at `url`; one that is there already and has the digest stays.

    It is written to `path` + ".part" and takes its name when its digest is right; what is damaged under its name is
    replaced only then. The lock on that temporary file is the token of the process that fetches: others wait for it,
    and take what it got. A temporary file that a killed process left is written anew.

    Args:
        algorithm, digest: of hashlib, such as "sha256", and the hexadecimal digest.
        size: bytes of the file; a server that sends more is broken off.

    Raises:
        OSError, http.client.HTTPException: the network or the disk fails, or takes longer than `STALL_SECONDS` for a
            block or `DEADLINE_SECONDS` in all (TimeoutError).
        ValueError: what came is another file.
    """
    deadline = time.monotonic() + DEADLINE_SECONDS
    path.parent.mkdir(parents=True, exist_ok=True)
    with _token(path, deadline) as file:
        if is_right(path, algorithm, digest):  # another process has been faster
            return
        print(f"downloading {url} ({size / 1e6:.0f} MB) to {path}", file=sys.stderr)
        actual, received = hashlib.new(algorithm, usedforsecurity=False), 0
        columns = (TextColumn(path.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=size)
            for block in _blocks(url, deadline):
                received += len(block)
                if received > size:
                    raise ValueError(f"what comes is another file: more than the {size:,} bytes expected")
                file.write(block)
                actual.update(block)
                bar.advance(task, len(block))
        if actual.hexdigest() != digest:
            raise ValueError(f"what came is another file: {counted(received, 'byte')}, another {algorithm.upper()}")
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


def is_right(path: Path, algorithm: str, digest: str) -> bool:
    """Whether the file is there and has the digest."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
            return found.hexdigest() == digest
    except FileNotFoundError:
        return False


@contextmanager
def _token(path: Path, deadline: float) -> Generator[BinaryIO]:
    """The temporary file, empty and locked; it is gone afterwards. Waits for another process that has it."""
    part = path.with_name(f"{path.name}.part")
    while True:
        file = part.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                break
        except (BlockingIOError, FileNotFoundError):
            pass  # another process has it, or has had it: then its name is gone, or stands for a newer file
        file.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process is downloading {path}, for more than {DEADLINE_SECONDS:g} s")
        time.sleep(0.05)
    try:
        file.truncate(0)
        yield file
    finally:
        part.unlink(missing_ok=True)  # before the lock goes, so that no one else's is removed
        file.close()


def _blocks(url: str, deadline: float) -> Iterator[bytes]:
    """The body at `url` in blocks; TimeoutError if the next one does not come in time.

    The network is read in a thread, since no timeout of urllib bounds a look-up of the name, several addresses that are
    tried in turn, or a body that trickles.
    """
    received: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    abandoned = threading.Event()

    def read() -> None:
        try:
            # Twice as long, so that the wait on the queue below always ends first and gives the one message.
            with urllib.request.urlopen(url, timeout=2 * STALL_SECONDS) as response:
                while not abandoned.is_set():
                    block = response.read(BLOCK_BYTES)
                    received.put(block)
                    if not block:
                        return
        except Exception as error:
            received.put(error)

    threading.Thread(target=read, name="download", daemon=True).start()
    try:
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the download was not done after {DEADLINE_SECONDS:g} s")
            try:
                block = received.get(timeout=STALL_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"the network did not answer within {STALL_SECONDS:g} s") from None
            if isinstance(block, Exception):
                raise block
            if not block:
                return
            yield block
    finally:
        abandoned.set()
